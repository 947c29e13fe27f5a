"""The last stage: which documents lie beside each other, the two sides of the data, and the counts of the report."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexshare.data.shards import ShardWriter, token_type
from indexshare.data.stages import Dropped, Kept, Report, Work

_CACHED_PARTS = 16  # of a few MB each: documents of a repository come from few parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All documents that passed the filters, in the order of the sources; n of them in P parts of S sources.

    firsts [P + 1]: number of the first document of each part. sizes [n]: bytes of UTF-8. tokens [n]: with the end
    token, 0 for what was dropped later. homes [n]: number of the first document of the same repository, its own for one
    that stands alone. readmes [n]. dropped, by source: what the filters dropped. licenses: of documents with tokens.
    """

    firsts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    tokens: NDArray[np.int64]
    homes: NDArray[np.int64]
    readmes: NDArray[np.bool_]
    dropped: tuple[dict[str, Dropped], ...]
    licenses: Counter[str]


def survey(work: Work, source_of: Sequence[int], num_sources: int) -> Survey:
    """Count what the stages left; `source_of`: the source of each part."""
    firsts, sizes, tokens, homes, readmes = [0], [], [np.empty(0, np.int64)], [], []
    home_of: dict[tuple[int, str], int] = {}
    dropped: tuple[dict[str, Dropped], ...] = tuple({} for _ in range(num_sources))
    licenses: Counter[str] = Counter()
    for number, source in enumerate(source_of):
        part = work.read(number)
        lengths = np.load(work.file("tokens", number, "npy"))
        tokens.append(lengths)
        for document, length in zip(part.kept, lengths, strict=True):
            sizes.append(document.end - document.begin)
            homes.append(home_of.setdefault((source, document.group), len(homes)) if document.group else len(homes))
            readmes.append(PurePath(document.source).name.lower().startswith("readme"))
            licenses.update([document.license or "unknown"] if length else [])
        firsts.append(len(sizes))
        for reason, amount in part.dropped.items():
            dropped[source].setdefault(reason, Dropped()).merge(amount)
    return Survey(
        firsts=np.asarray(firsts, np.int64),
        sizes=np.asarray(sizes, np.int64),
        tokens=np.concatenate(tokens),
        homes=np.asarray(homes, np.int64),
        readmes=np.asarray(readmes, np.bool_),
        dropped=dropped,
        licenses=licenses,
    )


def write_split(
    directory: Path,
    work: Work,
    found: Survey,
    chosen: NDArray[np.bool_],
    *,
    vocab_size: int,
    tokenizer_fingerprint: str,
    report: Report,
) -> tuple[int, int]:
    """Write the chosen documents: those of a repository together, its README first. -> segments, shards."""
    order = np.lexsort((np.arange(len(chosen)), ~found.readmes, found.homes))
    order = order[chosen[order]]
    part_of = np.searchsorted(found.firsts, order, side="right") - 1
    parts = _Parts(work, token_type(vocab_size))
    num_segments, before = 0, -1
    with ShardWriter(directory, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint) as writer:
        for done, (number, part) in enumerate(zip(order.tolist(), part_of.tolist(), strict=True)):
            place = number - int(found.firsts[part])
            home = int(found.homes[number])
            ids, ends = parts.tokens(part)
            begin = int(ends[place]) - int(found.tokens[number])
            writer.add(ids[begin : ends[place]], parts.kept(part)[place].source, opens_segment=home != before)
            num_segments, before = num_segments + (home != before), home
            if done % 256 == 0:
                report(done, len(order))
    report(len(order), len(order))
    return num_segments, writer.num_shards


class _Parts:
    """What the stages left of a part, the last few kept in memory."""

    def __init__(self, work: Work, dtype: np.dtype[Any]) -> None:
        self._work, self._dtype = work, dtype
        self.kept = lru_cache(_CACHED_PARTS)(self._kept)
        self.tokens = lru_cache(_CACHED_PARTS)(self._tokens)

    def _kept(self, part: int) -> list[Kept]:
        return self._work.read(part).kept

    def _tokens(self, part: int) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """-> token ids of all its documents, and where each ends."""
        ends = np.cumsum(np.load(self._work.file("tokens", part, "npy")))
        return np.fromfile(self._work.file("tokens", part, "bin"), self._dtype), ends
