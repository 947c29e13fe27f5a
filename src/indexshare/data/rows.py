"""Packed rows of tokens, and batches of them that are a pure function of (seed, step)."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.documents import Document, read_documents
from indexshare.data.shards import INDEX, TokenFile, fingerprint, holds_tokens
from indexshare.errors import RequestError, TrainingError

IGNORED = -100  # a target that is not to be learned


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's data, B rows of T tokens.

    token_ids, targets, positions: int64 [B, T]; `targets` is the next token, or -100 where nothing is to be learned;
    loss_weights: float32 [B, T], 0 exactly where targets is -100. segment_starts: offsets into the flattened [B*T]
    batch at which a new segment begins, ascending, first 0 and last B*T, as KeyLayout.sequence_starts wants them. A
    segment is one document, or neighbouring documents of one repository, which see each other.
    """

    token_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_weights: NDArray[np.float32]
    positions: NDArray[np.int64]
    segment_starts: tuple[int, ...]

    def rows(self, begin: int, end: int) -> "Batch":
        """Some of the rows, as a batch of their own."""
        length = self.token_ids.shape[1]
        first, last = begin * length, end * length
        return Batch(
            token_ids=self.token_ids[begin:end],
            targets=self.targets[begin:end],
            loss_weights=self.loss_weights[begin:end],
            positions=self.positions[begin:end],
            segment_starts=tuple(start - first for start in self.segment_starts if first <= start <= last),
        )

    def without_padding(self) -> "Batch":
        """One row of the segments in which anything is supervised; the batch itself when these are all, or none.

        Segments do not see each other, so that losses stay what they are; but padding would count as work of experts.
        """
        wanted = np.logical_or.reduceat(self.targets.ravel() != IGNORED, self.segment_starts[:-1])
        if wanted.all() or not wanted.any():
            return self
        lengths = np.diff(self.segment_starts)
        kept = np.repeat(wanted, lengths)
        return Batch(
            token_ids=self.token_ids.ravel()[None, kept],
            targets=self.targets.ravel()[None, kept],
            loss_weights=self.loss_weights.ravel()[None, kept],
            positions=self.positions.ravel()[None, kept],
            segment_starts=(0, *np.cumsum(lengths[wanted]).tolist()),
        )


class TokenRows:
    """Documents, one after another, cut into rows of `length` tokens.

    The rows are shuffled anew in each epoch; everything is a pure function of the seed.
    """

    def __init__(
        self,
        token_ids: NDArray[np.integer] | TokenFile,
        starts: NDArray[np.int64],
        *,
        length: int,
        seed: int = 0,
        segments: NDArray[np.int64] | None = None,
    ) -> None:
        """token_ids [n]: all documents, each closed by its end token. starts: where each begins, ascending.

        segments: which of the starts also begin something new to attend to; by default all.
        """
        self.length, self.seed = length, seed
        self.num_rows = (len(token_ids) - 1) // length
        if self.num_rows <= 0:
            raise TrainingError(f"{len(token_ids):,} tokens do not fill one row of {length:,}: give more data")
        self._token_ids, self._starts = token_ids, starts
        self._segments = starts if segments is None else segments
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the epoch that was asked for last

    @classmethod
    def from_files(
        cls, sources: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, *, length: int, seed: int = 0
    ) -> "TokenRows":
        """Rows of the documents of files and folders, tokenised here and held in memory."""
        documents = read_documents(sources)
        token_ids, starts, segments = _encode(documents, tokenizer)
        return cls(token_ids, starts, length=length, seed=seed, segments=segments)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], *, length: int, seed: int = 0) -> "TokenRows":
        """Rows of what `indexshare data build` wrote, memory-mapped; `DIRECTORY/held_out` gives the held-out documents.

        Raises TrainingError when the directory holds no such data or a file is damaged.
        """
        path = built_data(directory)
        if path is None:
            raise TrainingError(f"{directory} has no {INDEX}: give what `indexshare data build` wrote")
        tokens = TokenFile(path)
        return cls(tokens, tokens.starts, length=length, seed=seed, segments=tokens.segments)

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of step `step` (0, 1, ...), each row once an epoch."""
        rows = [self._row(step * batch_size + index) for index in range(batch_size)]
        tokens = np.stack([self._token_ids[begin : begin + self.length + 1] for begin in rows]).astype(np.int64)
        targets = tokens[:, 1:].copy()
        positions = np.empty_like(targets)
        starts: list[int] = []
        for index, begin in enumerate(rows):
            bounds = np.concatenate(
                ([0], _between(self._segments, begin + 1, begin + self.length) - begin, [self.length])
            )
            starts += (bounds[:-1] + index * self.length).tolist()
            positions[index] = np.arange(self.length) - np.repeat(bounds[:-1], np.diff(bounds))
            # What follows an end is another document: not to be predicted from this one.
            closed = _between(self._starts, begin + 1, begin + self.length + 1) - begin
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
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return int(self._order[1][place]) * self.length


def open_rows(
    sources: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, *, length: int, seed: int = 0
) -> TokenRows:
    """Rows of files and folders, tokenised here, or of one directory that `indexshare data build` wrote.

    Raises TrainingError, also when the data were built with another tokenizer.
    """
    built = [path for path in map(built_data, sources) if path is not None]
    if not built:
        return TokenRows.from_files(sources, tokenizer, length=length, seed=seed)
    if len(sources) > 1:
        raise TrainingError(f"{built[0]} is built data: give it alone, or build all sources together")
    tokens = TokenFile(built[0])
    if tokens.index["tokenizer"] != fingerprint(tokenizer):
        raise TrainingError(f"{built[0]} was built with another tokenizer: build it with --tokenizer MODEL")
    return TokenRows(tokens, tokens.starts, length=length, seed=seed, segments=tokens.segments)


def built_data(source: str | os.PathLike[str]) -> Path | None:
    """Where the index lies, if the source is what `indexshare data build` wrote, or its part train or held_out."""
    path = Path(source)
    return next((here for here in (path, path / "train") if holds_tokens(here)), None)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """-> token ids [n] of all documents, each closed by <|endoftext|>, and where each begins."""
    return _encode(documents, tokenizer)[:2]


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """As `encode_documents`, and where what is packed together begins."""
    end = tokenizer.control_id("<|endoftext|>")
    pieces: list[NDArray[np.int64]] = []
    is_new: list[bool] = []
    group = ""
    for document in documents:
        try:
            pieces.append(np.asarray([*tokenizer.encode(document.text), end], dtype=np.int64))
        except RequestError as error:
            raise TrainingError(f"{document.source}: {error}; `indexshare data build` leaves it out") from error
        is_new.append(not document.group or document.group != group)
        group = document.group
    if not pieces:
        raise TrainingError("there is no document in the data: give text, code or JSON lines")
    starts = np.cumsum([0] + [len(piece) for piece in pieces])[:-1]
    return np.concatenate(pieces), starts, starts[np.asarray(is_new)]


def _between(ascending: NDArray[np.int64], begin: int, end: int) -> NDArray[np.int64]:
    """The values from `begin` up to but not including `end`."""
    first, last = np.searchsorted(ascending, (begin, end))
    return ascending[first:last]
