"""Which files a source has, in one order on every machine, and JSON lines out of them. Nothing outside is reached."""

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from indexshare.chat.types import parse_json
from indexshare.errors import TrainingError

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
MAX_LINE_BYTES = 64 * 1024 * 1024
UNREADABLE = (OSError, EOFError, zlib.error)  # what reading raises, the last two for a gzip file that is damaged
# Version control, packages of others, virtual environments, what tools leave behind.
SKIPPED_DIRECTORIES = frozenset(
    ".git .hg .svn node_modules bower_components site-packages dist-packages __pycache__ .venv venv .tox .nox "
    ".mypy_cache .pytest_cache .ruff_cache .eggs .idea .ipynb_checkpoints".split()
)


def is_json_lines(path: Path) -> bool:
    """Whether the name says JSON lines, plain or gzip."""
    return path.name.lower().endswith(JSON_LINES)


def is_gzip(path: Path) -> bool:
    """Whether the name says gzip."""
    return path.suffix.lower() == ".gz"


def is_parquet(path: Path) -> bool:
    """Whether the name says Parquet."""
    return path.suffix.lower() == ".parquet"


def source_files(source: str | os.PathLike[str]) -> Iterator[Path]:
    """The regular files of a source, a file or a folder, in the order of their paths.

    Links below the source are not followed, so that nothing outside is read and no file is read twice. Raises
    TrainingError when the source does not exist or one of its folders cannot be read.
    """
    root = Path(source)
    if root.is_file():
        yield root
        return
    if not root.is_dir():
        raise TrainingError(f"{root} does not exist; give files or folders of text, code, JSON lines or Parquet")
    try:
        yield from _walk(root)
    except OSError as error:
        raise TrainingError(f"{root} cannot be read: {error}; make it readable or give other sources") from error


def _walk(directory: Path) -> Iterator[Path]:
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    names = {entry.name for entry in found}
    if "pyvenv.cfg" in names:  # a virtual environment under any name
        return
    for entry in found:
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode) and entry.name not in SKIPPED_DIRECTORIES:
            yield from _walk(directory / entry.name)
        elif stat.S_ISREG(mode):  # neither a link nor a device nor a pipe
            yield directory / entry.name


def open_bytes(path: Path) -> BinaryIO | gzip.GzipFile:
    """The bytes of a file, decompressed when its name ends in .gz."""
    return gzip.open(path, "rb") if is_gzip(path) else path.open("rb")


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank. Raises TrainingError, naming the line, for all but JSON."""
    number = 0
    try:
        with open_bytes(path) as lines:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
                if line.strip():
                    yield number, parse_json(line.decode("utf-8-sig"))
    except ValueError as error:
        raise TrainingError(f"{path}:{number} is not JSON: {error}") from error
    except UNREADABLE as error:
        raise TrainingError(f"{path} cannot be read after line {number}: {error}") from error
