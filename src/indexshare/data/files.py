"""Which files a source has, in one order on every machine, and JSON lines out of them. Nothing outside is reached."""

import gzip
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from indexshare.chat.types import parse_json
from indexshare.errors import TrainingError

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
MAX_LINE_BYTES = 64 * 1024 * 1024
# Version control, packages of others, virtual environments, what tools leave behind.
SKIPPED_DIRECTORIES = frozenset(
    ".git .hg .svn node_modules bower_components site-packages dist-packages __pycache__ .venv venv .tox .nox "
    ".mypy_cache .pytest_cache .ruff_cache .eggs .idea .ipynb_checkpoints".split()
)


def is_json_lines(path: Path) -> bool:
    """Whether the name says JSON lines, plain or gzip."""
    return path.name.endswith(JSON_LINES)


def source_files(source: str | os.PathLike[str]) -> Iterator[Path]:
    """The regular files of a source, a file or a folder, in the order of their paths.

    Links below the source are not followed, so that nothing outside is read and no file is read twice. Raises
    TrainingError when the source does not exist.
    """
    root = Path(source)
    if root.is_file():
        yield root
        return
    if not root.is_dir():
        raise TrainingError(f"{root} does not exist; give files or folders of text, code, JSON lines or Parquet")
    yield from _walk(root)


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
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank. Raises TrainingError, naming the line, for all but JSON."""
    with open_bytes(path) as lines:
        number = 0
        try:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
                if line.strip():
                    yield number, parse_json(line.decode("utf-8"))
        except (ValueError, OSError, EOFError) as error:  # EOFError, OSError: a gzip file that is cut off or damaged
            raise TrainingError(f"{path}:{number} is not JSON: {error}") from error
