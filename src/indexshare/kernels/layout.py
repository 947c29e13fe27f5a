"""Where the keys of each sequence lie in a pool of rows: the one addressing scheme of training and paged inference.

Shapes: T new tokens of all sequences, flat; B sequences; P pages per sequence; S keys of one sequence.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from indexshare.kernels.pool import Pool


@dataclass(frozen=True, kw_only=True)
class KeyLayout:
    """New tokens and visible keys of every sequence in one forward pass.

    sequence_starts: B+1 offsets into the flat batch; sequence b owns tokens starts[b] .. starts[b+1]-1.
    context_lengths: keys of each sequence once this step is written, the new tokens included.
    page_table: int64 [B, P] page numbers in the pools; None means that the pool *is* the flat batch (training).
    page_size: rows in a page.
    """

    sequence_starts: tuple[int, ...]
    context_lengths: tuple[int, ...]
    page_table: Tensor | None = None
    page_size: int = 1

    def __post_init__(self) -> None:
        assert len(self.sequence_starts) == len(self.context_lengths) + 1, "one start more than there are sequences"
        for index, length in enumerate(self.context_lengths):
            assert length >= self.num_new(index) > 0, "every sequence brings new tokens, and they are keys too"
        if self.page_table is None:
            assert all(length == self.num_new(i) for i, length in enumerate(self.context_lengths))

    @classmethod
    def packed(cls, sequence_starts: tuple[int, ...]) -> "KeyLayout":
        """Sequences without a past: each token sees the earlier tokens of its own sequence (training)."""
        lengths = tuple(end - start for start, end in pairwise(sequence_starts))
        return cls(sequence_starts=sequence_starts, context_lengths=lengths)

    def num_new(self, sequence: int) -> int:
        return self.sequence_starts[sequence + 1] - self.sequence_starts[sequence]

    @property
    def num_sequences(self) -> int:
        return len(self.context_lengths)

    @property
    def num_tokens(self) -> int:
        return self.sequence_starts[-1]

    @property
    def max_context(self) -> int:
        return max(self.context_lengths)

    def num_past(self, sequence: int) -> int:
        """Keys that were there before this step; new token i of the sequence sees num_past + i + 1 keys."""
        return self.context_lengths[sequence] - self.num_new(sequence)

    @cached_property
    def _rows(self) -> tuple[Tensor, ...]:
        if self.page_table is None:
            return tuple(
                torch.arange(start, start + length)
                for start, length in zip(self.sequence_starts[:-1], self.context_lengths, strict=True)
            )
        offsets = torch.arange(self.page_size, device=self.page_table.device)
        table = self.page_table.to(torch.int64)
        return tuple(
            (table[b, : -(-length // self.page_size), None] * self.page_size + offsets).flatten()[:length]
            for b, length in enumerate(self.context_lengths)
        )

    @cached_property
    def _first_rows(self) -> tuple[int | None, ...]:
        """First row of each sequence whose rows are one run in the pool, else None."""
        firsts: list[int | None] = []
        for rows in self._rows:
            is_run = bool((rows[1:] - rows[:-1] == 1).all())
            firsts.append(int(rows[0]) if is_run else None)
        return tuple(firsts)

    def rows(self, sequence: int) -> Tensor:
        """int64 [context_length]: the pool row of each key of the sequence, in logical order."""
        return self._rows[sequence]

    def keys(self, pool: Pool, sequence: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop-1 of the sequence's keys, [stop-start, W]; a view where the pages are neighbours."""
        stop = self.context_lengths[sequence] if stop is None else stop
        first = self._first_rows[sequence]
        if first is not None:
            return pool[first + start : first + stop]
        return pool.index_select(0, self._rows[sequence][start:stop].to(pool.device))

    @cached_property
    def starts_and_contexts(self) -> Tensor:
        """int64 [2B + 1]: sequence_starts, then context_lengths."""
        return torch.tensor((*self.sequence_starts, *self.context_lengths))

    @cached_property
    def new_rows(self) -> Tensor:
        """int64 [T]: the pool row that each new token is written to."""
        return torch.cat([self._rows[b][self.num_past(b) :] for b in range(self.num_sequences)])
