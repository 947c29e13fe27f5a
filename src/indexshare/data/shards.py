"""Tokens on disk: files of at most 64 MiB beside an index, read by memory mapping.

<directory>/index.json          dtype, totals, the tokenizer's fingerprint, each shard's tokens, both its files' sha256
            tokens-00000.bin    token ids, little-endian uint16 or uint32, documents one after another
            tokens-00000.json   "starts", "segments": where documents and what is packed together begin in this
                                shard; "sources": the name of the document at each start
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexshare.chat.tokenizer import Tokenizer
from indexshare.errors import TrainingError

FORMAT_VERSION = 1
SHARD_BYTES = 64 * 1024 * 1024
INDEX = "index.json"
_REBUILD = "delete what `indexshare data build` wrote and build the data again"


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def fingerprint(tokenizer: Tokenizer) -> str:
    """The same for tokenizers that have the same ids for the same bytes."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.control_ids.items())).encode())
    for token in range(tokenizer.vocab_size):
        digest.update(tokenizer.token_bytes(token) + b"\0")
    return digest.hexdigest()


class ShardWriter:
    """Context manager that writes documents in order; nothing is called `directory` before all of it is on the disk."""

    def __init__(
        self, directory: Path, *, vocab_size: int, tokenizer_fingerprint: str, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._directory, self._work = directory, incomplete(directory)
        self._dtype, self._fingerprint = token_type(vocab_size), tokenizer_fingerprint
        self._room = shard_bytes // self._dtype.itemsize
        self._shards: list[dict[str, Any]] = []
        self.num_documents = self.num_tokens = 0

    def __enter__(self) -> "ShardWriter":
        remove_directory(self._work)
        self._work.mkdir(parents=True)
        self._open_shard()
        return self

    def add(self, token_ids: NDArray[np.integer], source: str, *, opens_segment: bool) -> None:
        """One document, closed by its end token. It may go on in the next shard."""
        self._starts.append(self._held)
        self._sources.append(source)
        if opens_segment:
            self._segments.append(self._held)
        self.num_documents += 1
        self.num_tokens += len(token_ids)
        while len(token_ids):
            piece, token_ids = token_ids[: self._room - self._held], token_ids[self._room - self._held :]
            content = piece.astype(self._dtype).tobytes()
            self._file.write(content)
            self._sha256.update(content)
            self._held += len(piece)
            if self._held == self._room:
                self._close_shard()
                self._open_shard()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._file.close()
            return
        self._close_shard()
        index = {
            "version": FORMAT_VERSION,
            "dtype": self._dtype.str,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "tokenizer": self._fingerprint,
            "shards": self._shards,
        }
        write_file(self._work / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        remove_directory(self._directory)
        self._work.rename(self._directory)
        flush_directory(self._directory.parent)

    @property
    def num_shards(self) -> int:
        """Shards that are on the disk."""
        return len(self._shards)

    def _open_shard(self) -> None:
        self._file = (self._work / f"tokens-{self.num_shards:05d}.bin").open("wb")
        self._sha256 = hashlib.sha256()
        self._held = 0  # tokens in the open shard
        self._starts: list[int] = []
        self._segments: list[int] = []
        self._sources: list[str] = []

    def _close_shard(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        file = Path(self._file.name)
        if self._held == 0:
            file.unlink()
            return
        documents = {"starts": self._starts, "segments": self._segments, "sources": self._sources}
        content = json.dumps(documents).encode()
        write_file(file.with_suffix(".json"), content)
        self._shards.append(
            {
                "file": file.name,
                "num_tokens": self._held,
                "sha256": self._sha256.hexdigest(),
                "documents_sha256": hashlib.sha256(content).hexdigest(),
            }
        )


class TokenFile:
    """Token ids of all shards of a directory as if they were one array: `len`, and slices that are read when asked.

    starts, segments: int64, where each document, and each run of documents of one repository, begins.
    """

    def __init__(self, directory: Path) -> None:
        """Raises TrainingError, naming the file, for what is missing, cut off or of another version.

        Contents are not read: `verify` does.
        """
        self.index = _read_json(directory / INDEX)
        if not isinstance(self.index, dict) or self.index.get("version") != FORMAT_VERSION:
            raise TrainingError(f"{directory / INDEX} has another format: build the data again with this version")
        dtype = np.dtype(self.index["dtype"])
        self._shards: list[NDArray[np.integer]] = []
        starts, segments, offset = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
        for shard in self.index["shards"]:
            file = directory / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["num_tokens"] * dtype.itemsize:
                raise TrainingError(f"{file} is missing or cut off: {_REBUILD}")
            self._shards.append(np.memmap(file, dtype=dtype, mode="r"))
            documents = _read_json(file.with_suffix(".json"))
            starts.append(np.asarray(documents["starts"], np.int64) + offset)
            segments.append(np.asarray(documents["segments"], np.int64) + offset)
            offset += shard["num_tokens"]
        self.starts, self.segments = np.concatenate(starts), np.concatenate(segments)
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def __getitem__(self, wanted: slice) -> NDArray[np.int64]:
        begin, end, _ = wanted.indices(len(self))
        return np.concatenate([np.empty(0, np.int64), *self._pieces(begin, end)]).astype(np.int64, copy=False)

    def _pieces(self, begin: int, end: int) -> Iterator[NDArray[np.integer]]:
        shard = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            first = int(self._ends[shard]) - len(self._shards[shard])
            yield self._shards[shard][begin - first : end - first]
            begin, shard = int(self._ends[shard]), shard + 1


def holds_tokens(directory: Path) -> bool:
    """Whether the index of a directory is ours, or damaged; other programs write an index.json too."""
    try:
        index = json.loads((directory / INDEX).read_bytes())
    except OSError:
        return False
    except ValueError:
        return True
    return isinstance(index, dict) and "shards" in index


def verify(directory: Path) -> None:
    """Read every file and compare its sha256. Raises TrainingError for the first that is damaged."""
    for shard in TokenFile(directory).index["shards"]:
        file = directory / shard["file"]
        for part, sha256 in ((file, shard["sha256"]), (file.with_suffix(".json"), shard["documents_sha256"])):
            with part.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != sha256:
                    raise TrainingError(f"{part} is damaged: {_REBUILD}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}; give what `indexshare data build` wrote") from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the machine stops."""
    temporary = incomplete(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def incomplete(path: Path) -> Path:
    """What a file or directory is called until all of it is on the disk."""
    return path.with_name(f".incomplete-{path.name}")


def flush_directory(directory: Path) -> None:
    """Make what was renamed in a directory last."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_directory(directory: Path) -> None:
    """Remove the files of a directory that we wrote, one level deep, and the directory; nothing else."""
    if directory.is_dir():
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
