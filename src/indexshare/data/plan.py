"""How the work is cut: parts of about 8 MiB, the same ones whatever the number of processes.

A file that can only be read from its beginning is one part, however large; `stages.read_stage` cuts what comes out.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from indexshare.data.documents import Part, open_parquet
from indexshare.data.files import is_gzip, is_json_lines, is_parquet, source_files
from indexshare.errors import TrainingError

PART_BYTES = 8 * 1024 * 1024
MAX_FILES = 512  # in one part


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """parts: what is read together, never of two sources; source: for each the number of its source; identity: changes
    when a file comes, goes or is written."""

    parts: tuple[tuple[Part, ...], ...]
    source: tuple[int, ...]
    identity: str


def make_plan(sources: Sequence[str], output: Path) -> Plan:
    """Cut the files of the sources into parts.

    Raises TrainingError for a source that is missing, holds no files or holds `output`.
    """
    parts: list[tuple[Part, ...]] = []
    source_of: list[int] = []
    digest = hashlib.sha256()
    seen: dict[Path, str] = {}
    for number, source in enumerate(sources):
        resolved = Path(os.path.realpath(source))
        if Path(os.path.realpath(output)).is_relative_to(resolved):
            raise TrainingError(f"{output} lies in the source {source}, and would be read: choose another --output")
        if resolved in seen:
            raise TrainingError(f"{source} and {seen[resolved]} are the same: give each source once")
        seen[resolved] = source
        groups = list(_parts(source))
        if not groups:
            raise TrainingError(f"{source} holds no files to read: links, version control and packages are passed over")
        for group in groups:
            parts.append(group)
            source_of.append(number)
            digest.update(b"part\n")
            for part in group:
                status = os.stat(part.file)
                piece = f"{part.file}\0{part.begin}\0{status.st_size}\0{status.st_mtime_ns}\n"
                digest.update(piece.encode("utf-8", "surrogateescape"))
    return Plan(parts=tuple(parts), source=tuple(source_of), identity=digest.hexdigest())


def _parts(source: str) -> Iterator[tuple[Part, ...]]:
    gathered: list[Part] = []
    num_bytes = 0
    for file in source_files(source):
        size = file.stat().st_size
        whole = Part(file=str(file), root=source)
        pieces = list(_cut(file, whole, size))
        if len(pieces) > 1 or num_bytes + size > PART_BYTES or len(gathered) == MAX_FILES:
            if gathered:
                yield tuple(gathered)
            gathered, num_bytes = [], 0
        if len(pieces) > 1:
            yield from ((piece,) for piece in pieces)
        else:
            gathered.append(whole)
            num_bytes += size
    if gathered:
        yield tuple(gathered)


def _cut(file: Path, whole: Part, size: int) -> Iterator[Part]:
    """The pieces of a large file that can be read from the middle: lines, and row groups; else the whole."""
    if size > PART_BYTES and is_json_lines(file) and not is_gzip(file):
        for begin in range(0, size, PART_BYTES):
            yield replace(whole, begin=begin, end=min(begin + PART_BYTES, size))
    elif size > PART_BYTES and is_parquet(file):
        with open_parquet(file) as table:
            begin = num_bytes = 0
            for group in range(table.num_row_groups):
                num_bytes += table.metadata.row_group(group).total_byte_size
                if num_bytes >= PART_BYTES or group == table.num_row_groups - 1:
                    yield replace(whole, begin=begin, end=group + 1)
                    begin, num_bytes = group + 1, 0
    else:
        yield whole
