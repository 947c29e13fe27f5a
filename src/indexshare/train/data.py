"""From files to batches: tokenised shards, and packed batches that are a pure function of (seed, step).

    indexes, shards     prepare(directory)        writes tokenizer.json, train.bin, held_out.bin and a JSON sidecar for
    each batches             PackedBatches(directory, ...).batch(step)

A row of a batch is code (a pass through all training files in random order, a new order each time), retrieval
episodes, tool and talk episodes, or random tokens that repeat. Because a batch depends on the step alone, resuming a
run needs one integer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexshare.data.rows import IGNORED, Batch
from indexshare.errors import TrainingError
from indexshare.train import corpus
from indexshare.train.episodes import (
    Episode,
    SourceFile,
    TokenIds,
    answer,
    make_facts,
    make_retrieval,
    question,
    render_episode,
)
from indexshare.train.tokenizer import TextEncoder, save_tokenizer, train_tokenizer
from indexshare.train.tool_episodes import TALK, TOOLS, make_talk, make_tool_call
from indexshare.train.words import FIRST_WORDS, SECOND_WORDS

SHARD_TYPE = np.dtype("<u2")
_REPEATS_OF_WORDS = 250  # how often the tokenizer sees each word of a subject: enough to make each one token
_MIN_RETRIEVAL = 240

Progress = Callable[[int, int], None]


# --------------------------------------------------------------------------------------------------------------- shards


def prepare(
    directory: Path,
    *,
    tokenizer_directory: Path | None = None,
    root: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes the shards of the standard library below `directory`; returns the number of tokens of each.

    The tokenizer is that of `tokenizer_directory`, or trained here from the training files. `progress(done, total)`
    counts files.
    """
    training = corpus.training_files(root)
    if tokenizer_directory is None:
        save_tokenizer(
            train_tokenizer([corpus.read_text(path, root) for path in training] + episode_texts()), directory
        )
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes((tokenizer_directory / name).read_bytes())
    encoder = TextEncoder(directory)
    shards = {"train": training, "held_out": corpus.held_out_files(root)}
    for name, paths in shards.items():
        if not paths:
            raise TrainingError(
                f"the library holds no file of the shard {name}; pass the root of a whole standard library"
            )
    total = sum(len(paths) for paths in shards.values())
    done = 0
    counts: dict[str, int] = {}
    for name, paths in shards.items():
        pieces: list[NDArray[np.uint16]] = []
        files: list[dict[str, object]] = []
        for path in paths:
            text = corpus.read_text(path, root)
            file = tokenize_file(path, text, encoder)
            files.append(
                {
                    "path": path,
                    "num_tokens": len(file.token_ids),
                    "num_header": file.num_header,
                    "num_bytes": len(text.encode("utf-8")),
                }
            )
            pieces.append(file.token_ids.astype(SHARD_TYPE))
            done += 1
            if progress is not None:
                progress(done, total)
        counts[name] = _write_shard(directory, name, np.concatenate(pieces), files, encoder)
    return counts


def file_header(path: str) -> str:
    """The line that stands before a file's text."""
    return f"# {path}\n"


def episode_texts() -> list[str]:
    """The words of the episodes, for the tokenizer: every word of a subject often enough to become one token."""
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for _ in range(_REPEATS_OF_WORDS):
        texts += [
            f"{question(fact)}\n{answer(fact)}" for fact in make_facts(rng, min(len(FIRST_WORDS), len(SECOND_WORDS)))
        ]
    # A distinct draw leaves out some of the longer list each time; every word of both gets its full count here.
    for words, prefix in ((FIRST_WORDS, " "), (SECOND_WORDS, "-")):
        texts += [prefix + word for word in words] * _REPEATS_OF_WORDS
    texts += [f"{user}\n{reply}" for user, reply in TALK] * 20
    for tool in TOOLS:
        uses = [tool.make_use(rng) for _ in range(100)]
        texts += [
            f"{json.dumps(tool.description['function'])}\n{use.request}\n{use.result}\n{use.reply}" for use in uses
        ]
    return texts


def _write_shard(
    directory: Path, name: str, token_ids: NDArray[np.uint16], files: list[dict[str, object]], encoder: TextEncoder
) -> int:
    content = token_ids.tobytes()
    (directory / f"{name}.bin").write_bytes(content)
    sidecar = {
        "dtype": "uint16, little-endian",
        "num_tokens": len(token_ids),
        "sha256": hashlib.sha256(content).hexdigest(),
        "tokenizer_sha256": encoder.sha256,
        "files": files,
    }
    (directory / f"{name}.json").write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    return len(token_ids)


def load_shard(directory: Path, name: str, encoder: TextEncoder) -> list[SourceFile]:
    """The files of a shard ("train" or "held_out"). Raises TrainingError if it is missing, damaged, or of another
    tokenizer."""
    sidecar_path, shard_path = Path(directory, f"{name}.json"), Path(directory, f"{name}.bin")
    for path in (sidecar_path, shard_path):
        if not path.is_file():
            raise TrainingError(f"{path} does not exist; prepare the data first")
    sidecar = json.loads(sidecar_path.read_text(encoding="utf-8"))
    content = shard_path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sidecar["sha256"]:
        raise TrainingError(
            f"{shard_path} is not what {sidecar_path.name} describes; delete both and prepare the data again"
        )
    if sidecar["tokenizer_sha256"] != encoder.sha256:
        raise TrainingError(
            f"{shard_path} was written with another tokenizer than {encoder.path}; prepare the data again"
        )
    token_ids = np.frombuffer(content, dtype=SHARD_TYPE).astype(np.int64)
    files: list[SourceFile] = []
    begin = 0
    for entry in sidecar["files"]:
        end = begin + entry["num_tokens"]
        files.append(make_source_file(entry["path"], token_ids[begin:end], entry["num_header"], encoder))
        begin = end
    return files


def make_source_file(path: str, token_ids: TokenIds, num_header: int, encoder: TextEncoder) -> SourceFile:
    """Finds the places where the tokens [n] of a file, header first, may be interrupted and cut; see SourceFile."""
    before, after = token_ids[:-1], token_ids[1:]
    line_starts = np.flatnonzero(encoder.newline_end[before] & ~encoder.has_newline[after]) + 1
    line_ends = np.flatnonzero(encoder.word_end[before] & encoder.is_newlines[after]) + 1
    return SourceFile(
        path=path,
        token_ids=token_ids,
        num_header=num_header,
        line_starts=line_starts[line_starts >= num_header],
        line_ends=line_ends[line_ends >= num_header],
    )


def tokenize_file(path: str, text: str, encoder: TextEncoder) -> SourceFile:
    """A file for `build_document` from its text."""
    # Encoded together: a text that begins with an empty line shares a token with the header's newline.
    token_ids = np.asarray(encoder.encode(file_header(path) + text), dtype=np.int64)
    num_header = int(np.argmax(encoder.has_newline[token_ids])) + 1
    return make_source_file(path, token_ids, num_header, encoder)


# -------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What the rows of the batches are. Shares are of rows; the share of tool and talk rows is what remains of 1."""

    code: float = 0.6
    retrieval: float = 0.3
    repeats: float = 0.0  # rows of random tokens that come again: what induction heads learn from
    document_weight: float = 1.0  # loss weight of the code inside retrieval documents
    min_document: int = _MIN_RETRIEVAL  # tokens of a retrieval document, where that many are left of the row
    position_skips: float = 0.5  # share of rows whose positions skip ahead
    max_position: int = 131_072  # positions stay below this


class PackedBatches:
    """Batches of packed rows from the shards in `directory`; `batch(step)` is a pure function of (seed, step)."""

    def __init__(
        self, directory: Path, *, sequence_length: int, batch_size: int, seed: int = 0, mixture: Mixture | None = None
    ) -> None:
        self.mixture = Mixture() if mixture is None else mixture
        shares = (self.mixture.code, self.mixture.retrieval, self.mixture.repeats)
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise TrainingError("the shares of code, retrieval and repeats must not be negative, nor over 1 together")
        if not 32 <= sequence_length <= self.mixture.max_position:
            raise TrainingError(
                f"sequence_length {sequence_length} must lie between 32 and max_position {self.mixture.max_position}"
            )
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.encoder = TextEncoder(directory)
        self.files = load_shard(directory, "train", self.encoder)
        self.end_of_text = self.encoder.special["<|endoftext|>"]
        self.num_code_tokens = sum(len(file.token_ids) + 1 for file in self.files)
        self.rows_per_epoch = (self.num_code_tokens - 1) // sequence_length
        if self.rows_per_epoch == 0:
            raise TrainingError(f"{self.num_code_tokens} tokens of code do not fill a row of {sequence_length}")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def batch(self, step: int) -> Batch:
        """The batch of step `step` (0, 1, ...)."""
        shape = (self.batch_size, self.sequence_length)
        token_ids, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        positions, weights = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.float32)
        segment_starts: list[int] = []
        for row in range(self.batch_size):
            rng = np.random.default_rng([self.seed, step, row])
            segments = self._row(step * self.batch_size + row, rng)
            token_ids[row] = np.concatenate([tokens[:-1] for tokens, _ in segments])
            weights[row] = np.concatenate([weight[1:] for _, weight in segments])
            targets[row] = np.concatenate([tokens[1:] for tokens, _ in segments])
            lengths = [len(tokens) - 1 for tokens, _ in segments]
            positions[row] = self._positions(rng, lengths)
            segment_starts += [row * self.sequence_length + start for start in np.cumsum([0, *lengths[:-1]]).tolist()]
        targets[weights == 0] = IGNORED
        return Batch(
            token_ids=token_ids,
            targets=targets,
            loss_weights=weights,
            positions=positions,
            segment_starts=(*segment_starts, self.batch_size * self.sequence_length),
        )

    def _row(self, index: int, rng: np.random.Generator) -> list[tuple[TokenIds, NDArray[np.float32]]]:
        """Segments (token_ids [n+1], weights [n+1]) of row `index` of the whole run, n adding up to the sequence
        length."""
        num_code = int(index * self.mixture.code)
        if int((index + 1) * self.mixture.code) > num_code:
            return self._code(num_code)
        if rng.random() < self.mixture.repeats / (1 - self.mixture.code):
            return self._repeats(rng)
        episode_index = index - num_code
        share = self.mixture.retrieval / (1 - self.mixture.code - self.mixture.repeats)
        retrieval = int((episode_index + 1) * share) > int(episode_index * share)
        return self._episodes(rng, retrieval)

    def _make_epoch(self, epoch: int) -> tuple[TokenIds, NDArray[np.int64], NDArray[np.int64]]:
        """(token_ids [n], file starts, order of rows) of all files, each closed by <|endoftext|>, shuffled anew in each
        epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.files))
        end = np.asarray([self.end_of_text], dtype=np.int64)
        pieces = [piece for index in order for piece in (self.files[index].token_ids, end)]
        starts = np.cumsum([0] + [len(self.files[index].token_ids) + 1 for index in order])
        return np.concatenate(pieces), starts[:-1], rng.permutation(self.rows_per_epoch)

    def _code(self, index: int) -> list[tuple[TokenIds, NDArray[np.float32]]]:
        """Row `index` of all code rows: an epoch is cut into rows, which come in random order, so that the rows of a
        batch are of different files."""
        epoch, place = divmod(index, self.rows_per_epoch)
        tokens, starts, order = self._epoch(epoch)
        begin = int(order[place]) * self.sequence_length
        inside = starts[(starts > begin) & (starts < begin + self.sequence_length)] - begin
        segments: list[tuple[TokenIds, NDArray[np.float32]]] = []
        for start, stop in pairwise([0, *inside.tolist(), self.sequence_length]):
            part = tokens[begin + start : begin + stop + 1]  # the last token is only a target
            weight = np.ones(len(part), dtype=np.float32)
            # What follows <|endoftext|> is another file: not predictable from this one.
            weight[1:][part[:-1] == self.end_of_text] = 0.0
            segments.append((part, weight))
        return segments

    def _episodes(self, rng: np.random.Generator, retrieval: bool) -> list[tuple[TokenIds, NDArray[np.float32]]]:
        segments: list[tuple[TokenIds, NDArray[np.float32]]] = []
        room = self.sequence_length
        misfits = 0
        while room >= _MIN_RETRIEVAL and misfits < 4:
            tokens, weights = render_episode(self._make_episode(rng, retrieval, room), self.encoder)
            if len(tokens) - 1 > room:
                misfits += 1
                continue
            segments.append((tokens, weights))
            room -= len(tokens) - 1
        if room:
            segments.append(self._filler(rng, room))
        return segments

    def _make_episode(self, rng: np.random.Generator, retrieval: bool, room: int) -> Episode:
        if not retrieval:
            return make_talk(rng) if rng.random() < 0.2 else make_tool_call(rng)
        # Uniform in the logarithm, so that short documents, dense in answers, are as frequent as long ones.
        shortest = min(self.mixture.min_document, room)
        wanted = int(np.exp(rng.uniform(np.log(shortest), np.log(room))))
        if room - wanted < _MIN_RETRIEVAL:
            wanted = room
        return make_retrieval(rng, self.files, self.encoder, wanted + 1, self.mixture.document_weight)

    def _repeats(self, rng: np.random.Generator) -> list[tuple[TokenIds, NDArray[np.float32]]]:
        """Random tokens said several times; only the repetitions, which can be predicted, are supervised."""
        segments: list[tuple[TokenIds, NDArray[np.float32]]] = []
        room = self.sequence_length
        while room:
            length = min(room, int(np.exp(rng.uniform(np.log(48), np.log(768)))))
            period = max(2, int(length * rng.uniform(0.1, 0.5)))
            unit = rng.integers(0, min(self.encoder.special.values()), size=period)
            weights = np.ones(length + 1, dtype=np.float32)
            weights[: period + 1] = 0.0
            segments.append((np.resize(unit, length + 1), weights))
            room -= length
        return segments

    def _filler(self, rng: np.random.Generator, num_tokens: int) -> tuple[TokenIds, NDArray[np.float32]]:
        """A random piece of code of num_tokens + 1 tokens, for the end of a row of episodes."""
        tokens, _, _ = self._epoch(0)
        begin = int(rng.integers(0, len(tokens) - num_tokens - 1))
        part = tokens[begin : begin + num_tokens + 1]
        weights = np.ones(len(part), dtype=np.float32)
        weights[1:][part[:-1] == self.end_of_text] = 0.0
        return part, weights

    def _positions(self, rng: np.random.Generator, lengths: list[int]) -> TokenIds:
        """Positions [sum of lengths]: 0, 1, ... in each segment, in some rows with an offset and skips (PoSE, arXiv
        2309.10400).

        An offset and up to three skips, each uniform in its logarithm, carry positions up to max_position.
        """
        skipping = rng.random() < self.mixture.position_skips
        pieces: list[TokenIds] = []
        for length in lengths:
            positions = np.arange(length, dtype=np.int64)
            if skipping:
                room = self.mixture.max_position - length
                where = np.concatenate([[0], rng.integers(0, length, size=int(rng.integers(0, 4)))])
                for at in where[rng.permutation(len(where))]:
                    jump = int(np.exp(rng.uniform(0.0, np.log(room + 1)))) if room > 0 else 0
                    jump = min(jump, room)
                    positions[at:] += jump
                    room -= jump
            pieces.append(positions)
        return np.concatenate(pieces)
