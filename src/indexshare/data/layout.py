"""The last stage: which documents lie beside each other, the two sides of the data, and the counts of the report."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from indexshare.data.shards import ShardWriter, token_type
from indexshare.data.stages import Dropped, Report, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All documents that passed the filters, in the order of the sources; n of them in P pieces of S sources.

    pieces [P], names [n]: of pieces, of documents. firsts [P + 1]: number of the first document of each piece. sizes
    [n]: bytes of UTF-8. tokens [n]: with the end token, 0 for what was dropped later. homes [n]: number of the first
    document of the same repository, its own for one that stands alone. readmes [n]: whether it is one. dropped, by
    source: what the filters dropped. licenses: of documents with tokens.
    """

    pieces: tuple[str, ...]
    firsts: NDArray[np.int64]
    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    tokens: NDArray[np.int64]
    homes: NDArray[np.int64]
    readmes: NDArray[np.bool_]
    dropped: tuple[dict[str, Dropped], ...]
    licenses: Counter[str]


def survey(work: Work, pieces: Sequence[str], source_of: Sequence[int], num_sources: int) -> Survey:
    """Count what the stages left; `source_of`: the source of each piece."""
    names: list[str] = []
    firsts, sizes, tokens, homes, readmes = [0], [], [np.empty(0, np.int64)], [], []
    home_of: dict[tuple[int, str], int] = {}
    dropped: tuple[dict[str, Dropped], ...] = tuple({} for _ in range(num_sources))
    licenses: Counter[str] = Counter()
    for name, source in zip(pieces, source_of, strict=True):
        piece = work.read(name)
        lengths = np.load(work.file("tokens", name, "npy"))
        tokens.append(lengths)
        for document, length in zip(piece.kept, lengths, strict=True):
            names.append(document.source)
            sizes.append(document.end - document.begin)
            homes.append(home_of.setdefault((source, document.group), len(homes)) if document.group else len(homes))
            readmes.append(PurePath(document.source).name.lower().startswith("readme"))
            licenses.update([document.license or "unknown"] if length else [])
        firsts.append(len(sizes))
        for reason, amount in piece.dropped.items():
            dropped[source].setdefault(reason, Dropped()).merge(amount)
    return Survey(
        pieces=tuple(pieces),
        firsts=np.asarray(firsts, np.int64),
        names=tuple(names),
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
    piece_of = np.searchsorted(found.firsts, order, side="right") - 1
    dtype = token_type(vocab_size)
    before_each = np.concatenate([[0], np.cumsum(found.tokens)])  # tokens
    offsets = dtype.itemsize * (before_each[order] - before_each[found.firsts[piece_of]])
    num_segments, before = 0, -1
    with ShardWriter(directory, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint) as writer:
        for done, (number, piece, offset) in enumerate(
            zip(order.tolist(), piece_of.tolist(), offsets.tolist(), strict=True)
        ):
            home = int(found.homes[number])
            file = work.file("tokens", found.pieces[piece], "bin")
            ids = np.fromfile(file, dtype, count=int(found.tokens[number]), offset=offset)
            writer.add(ids, found.names[number], opens_segment=home != before)
            num_segments, before = num_segments + (home != before), home
            if done % 256 == 0:
                report(done, len(order))
    report(len(order), len(order))
    return num_segments, writer.num_shards
