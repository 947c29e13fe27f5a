"""Rows for three uses that have no token in common: to measure on, to choose a pattern by, and to train on.

What `indexshare data build` wrote has held-out documents already. Other data are split by document: as many as it
takes, in an order drawn by the seed. A document is cut in two only where nothing would be left to train on otherwise.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.documents import read_documents
from indexshare.data.rows import Batch, TokenRows, built_data, encode_documents, open_rows
from indexshare.data.shards import INDEX, TokenFile
from indexshare.errors import ConfigError, TrainingError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """held_out, calibration: one batch for each row. training: every other document. fingerprint: of all of the data
    and of how they were split, in hexadecimal."""

    held_out: tuple[Batch, ...]
    calibration: tuple[Batch, ...]
    training: TokenRows
    fingerprint: str


def split_rows(
    sources: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    *,
    length: int,
    num_held_out: int,
    num_calibration: int = 0,
    seed: int = 0,
) -> Split:
    """Rows of `length` tokens. sources: as in `open_rows`.

    Of built data there may be fewer held-out rows than asked for, which is said on stderr. Raises ConfigError for
    numbers that cannot be, TrainingError for data that are unusable or too few.
    """
    if length < 2 or num_held_out < 1 or num_calibration < 0 or seed < 0:
        raise ConfigError(
            f"take one row at least to measure on, of two tokens at least, with a seed from 0 on, not {num_held_out:,} "
            f"of {length:,} with {seed}"
        )
    texts, held_out = _read(sources, tokenizer, length=length, seed=seed)
    wanted = [0 if held_out else num_held_out, num_calibration]
    spans = _share_out(texts, [number and number * length + 1 for number in wanted], length=length, seed=seed)
    first, calibration, training = (texts.rows(taken, length=length, seed=seed) for taken in spans)
    held_out = held_out or first
    assert held_out is not None and training is not None, "there is a row of each, or an error"
    if held_out.num_rows < num_held_out:
        sys.stderr.write(f"measuring on {held_out.num_rows:,} rows, all that are held out, not {num_held_out:,}\n")
    batches = tuple(held_out.batch(row, 1) for row in range(min(num_held_out, held_out.num_rows)))
    digest = hashlib.sha256(f"{texts.fingerprint} {spans} {length} {seed}".encode())
    for batch in batches:
        digest.update(batch.token_ids.tobytes())
    return Split(
        held_out=batches,
        calibration=tuple(calibration.batch(row, 1) for row in range(num_calibration)) if calibration else (),
        training=training,
        fingerprint=digest.hexdigest()[:16],
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Texts:
    """Documents one after another. starts, segments: as in `TokenRows`."""

    tokens: NDArray[np.integer] | TokenFile
    starts: NDArray[np.int64]
    segments: NDArray[np.int64]
    fingerprint: str

    def rows(self, spans: Sequence[Span], *, length: int, seed: int) -> TokenRows | None:
        """Rows of some spans, None without any. What is in two spans does not see each other."""
        if not spans:
            return None
        offsets = np.cumsum([0, *(end - begin for begin, end in spans)])

        def moved(places: NDArray[np.int64]) -> NDArray[np.int64]:
            inside = [
                places[(begin < places) & (places < end)] - begin + offset
                for (begin, end), offset in zip(spans, offsets[:-1], strict=True)
            ]
            return np.sort(np.concatenate([offsets[:-1], *inside]))

        pieces: Any = _Pieces(self.tokens, spans, offsets)
        return TokenRows(pieces, moved(self.starts), length=length, seed=seed, segments=moved(self.segments))


class _Pieces:
    """Spans of tokens as if they were one array: `len`, and slices that are read when asked."""

    def __init__(self, tokens: NDArray[np.integer] | TokenFile, spans: Sequence[Span], offsets: NDArray[np.int64]):
        self._tokens, self._spans, self._offsets = tokens, spans, offsets

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, wanted: slice) -> NDArray[np.integer]:
        begin, end, _ = wanted.indices(len(self))
        first, last = np.searchsorted(self._offsets, (begin + 1, end))
        touched = zip(self._spans[first - 1 : last], self._offsets[first - 1 : last], strict=True)
        return np.concatenate(
            [
                self._tokens[start + max(begin - offset, 0) : min(start + end - offset, stop)]
                for (start, stop), offset in touched
            ]
        )


def _read(
    sources: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, *, length: int, seed: int
) -> tuple[_Texts, TokenRows | None]:
    """What is to be split, and the rows that were held out when it was built, if they fill one."""
    built = next(filter(None, map(built_data, sources)), None)
    if built is None:
        documents = list(read_documents(sources))
        token_ids, starts = encode_documents(documents, tokenizer)
        groups = ["", *(document.group for document in documents)]
        is_new = [not after or after != before for before, after in pairwise(groups)]
        fingerprint = hashlib.sha256(token_ids.tobytes() + starts.tobytes()).hexdigest()
        return _Texts(tokens=token_ids, starts=starts, segments=starts[is_new], fingerprint=fingerprint), None
    open_rows(sources, tokenizer, length=length)  # checks them
    tokens = TokenFile(built)
    fingerprint = hashlib.sha256(msgspec.json.encode(tokens.index)).hexdigest()
    texts = _Texts(tokens=tokens, starts=tokens.starts, segments=tokens.segments, fingerprint=fingerprint)
    return texts, _built_held_out(built, length, seed)


def _built_held_out(built: Path, length: int, seed: int) -> TokenRows | None:
    held_out = built.with_name("held_out")
    if built.name != "train" or not (held_out / INDEX).is_file() or len(TokenFile(held_out)) <= length:
        return None
    return TokenRows.from_directory(held_out, length=length, seed=seed)


def _share_out(texts: _Texts, wanted: Sequence[int], *, length: int, seed: int) -> list[list[Span]]:
    """Spans of whole documents with at least so many tokens for each, and what is left, at least a row."""
    num_tokens = len(texts.tokens)
    reserve = sum(wanted) + length + 1  # what has to be left
    if num_tokens < reserve:
        options = "--held-out-rows and --rows" if wanted[1] else "--held-out-rows"
        raise TrainingError(
            f"the data have {num_tokens:,} tokens, and it takes {reserve:,} to set rows of {length:,} aside and"
            f" train on one: give more data, shorter rows with --length, or fewer with {options}"
        )
    ends = [*texts.segments[1:].tolist(), num_tokens]
    order = np.random.default_rng(seed).permutation(len(ends))
    free = [(int(texts.segments[index]), int(ends[index])) for index in order]
    num_free = num_tokens
    shares: list[list[Span]] = []
    for number in wanted:
        taken: list[Span] = []
        while number > 0:
            begin, end = free.pop()
            borders = texts.starts[np.searchsorted(texts.starts, begin + number) :]
            stop = min(end, int(borders[0]) if len(borders) else end)
            if num_free - (stop - begin) < reserve - min(number, stop - begin):
                stop = begin + number  # in the middle of a document
            if stop < end:
                free.insert(0, (stop, end))
            num_free -= stop - begin
            reserve -= min(number, stop - begin)
            number -= stop - begin
            taken.append((begin, stop))
        shares.append(sorted(taken))
    return [*shares, sorted(free)]
