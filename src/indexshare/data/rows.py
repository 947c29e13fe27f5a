"""Packed rows of tokens, and batches of them that are a pure function of (seed, step)."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.documents import Document, read_documents
from indexshare.errors import TrainingError

IGNORED = -100  # a target that is not to be learned


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's data, B rows of T tokens.

    token_ids, targets, positions: int64 [B, T]; `targets` is the next token, or -100 where nothing is to be learned;
    loss_weights: float32 [B, T], 0 exactly where targets is -100. segment_starts: offsets into the flattened [B*T]
    batch at which a new document begins, ascending, first 0 and last B*T, as KeyLayout.sequence_starts wants them.
    """

    token_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_weights: NDArray[np.float32]
    positions: NDArray[np.int64]
    segment_starts: tuple[int, ...]


class TokenRows:
    """Documents, one after another, cut into rows of `length` tokens.

    `order(epoch)` shuffles the rows anew in each epoch; everything is a pure function of the seed.
    """

    def __init__(
        self, token_ids: NDArray[np.integer], starts: NDArray[np.int64], *, length: int, seed: int = 0
    ) -> None:
        """token_ids [n]: all documents, each closed by its end token. starts: where each begins."""
        self.length, self.seed = length, seed
        self.num_rows = (len(token_ids) - 1) // length
        if self.num_rows == 0:
            raise TrainingError(f"{len(token_ids):,} tokens do not fill one row of {length:,}: give more data")
        self._token_ids, self._starts = token_ids, starts

    @classmethod
    def from_files(
        cls, sources: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, *, length: int, seed: int = 0
    ) -> "TokenRows":
        """Rows of the documents of files and folders, tokenised here and held in memory."""
        token_ids, starts = encode_documents(read_documents(sources), tokenizer)
        return cls(token_ids, starts, length=length, seed=seed)

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of step `step` (0, 1, ...), each row once an epoch."""
        rows = [self._row(step * batch_size + index) for index in range(batch_size)]
        tokens = np.stack([self._token_ids[begin : begin + self.length + 1] for begin in rows]).astype(np.int64)
        targets = tokens[:, 1:].copy()
        positions = np.empty_like(targets)
        starts: list[int] = []
        for index, begin in enumerate(rows):
            inside = self._starts[(self._starts > begin) & (self._starts < begin + self.length)] - begin
            bounds = np.concatenate(([0], inside, [self.length]))
            starts += (bounds[:-1] + index * self.length).tolist()
            positions[index] = np.arange(self.length) - np.repeat(bounds[:-1], np.diff(bounds))
            # What follows an end is another document: not to be predicted from this one.
            closed = self._starts[(self._starts > begin) & (self._starts <= begin + self.length)] - begin
            targets[index, closed - 1] = IGNORED
        return Batch(
            token_ids=tokens[:, :-1],
            targets=targets,
            loss_weights=(targets != IGNORED).astype(np.float32),
            positions=positions,
            segment_starts=(*starts, batch_size * self.length),
        )

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, self.num_rows)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return int(order[place]) * self.length


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """-> token ids [n] of all documents, each closed by <|endoftext|>, and where each begins."""
    end = tokenizer.control_id("<|endoftext|>")
    pieces = [np.asarray([*tokenizer.encode(document.text), end], dtype=np.int64) for document in documents]
    if not pieces:
        raise TrainingError("there is no document in the data: give text, code or JSON lines")
    starts = np.cumsum([0] + [len(piece) for piece in pieces])[:-1]
    return np.concatenate(pieces), starts
