"""Documents from files: JSON lines, Parquet, plain text and code, one file or whole folders."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from indexshare.chat.types import parse_json
from indexshare.data.files import (
    MAX_LINE_BYTES,
    UNREADABLE,
    is_json_lines,
    is_parquet,
    open_bytes,
    read_json_lines,
    source_files,
)
from indexshare.data.licenses import LICENSE_FILE, license_of_source, license_of_text
from indexshare.errors import TrainingError

CODE_SUFFIXES = frozenset(
    ".py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .m .mm .rs .go .java .kt .scala .swift .cs .fs .js .mjs .cjs "
    ".jsx .ts .tsx .vue .rb .php .pl .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .dart .zig .nim "
    ".sh .bash .zsh .fish .ps1 .bat .sql .css .scss .less .html .htm .xml .json .yaml .yml .toml .ini .cfg .csv .tsv "
    ".tf .proto .thrift .graphql .cmake .mk .asm .s .v .sv .vhd .f .f90 .pas .ada .d .groovy .gradle".split()
)
_REPOSITORY_FILES = frozenset(
    ".git .hg .svn pyproject.toml setup.py package.json Cargo.toml go.mod pom.xml build.gradle CMakeLists.txt".split()
)
_TEXT_FIELDS, _GROUP_FIELDS = ("text", "content"), ("group", "repo", "repo_name")
_PARQUET_ROWS = 64  # rows in memory at once
_PARQUET_BUFFER = 1024 * 1024  # bytes of each column; without it a whole row group is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text and where it came from: a path, with `:line` for one of many in a file.

    group: the repository it belongs to, whose documents are packed together; "" for a text that stands alone. is_root:
    that the repository is the whole source. license: an SPDX expression, "" where none is known.
    """

    text: str
    source: str
    group: str = ""
    is_root: bool = False
    license: str = ""
    is_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """What could not be read as a document, and why: a key of quality.REASONS."""

    source: str
    reason: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of work: a file below a source, or a part of it: bytes of JSON lines, row groups of Parquet.

    A line belongs to the part in which it begins. end: None for the whole file.
    """

    file: str
    root: str
    begin: int = 0
    end: int | None = None


def read_documents(sources: Sequence[str | os.PathLike[str]]) -> Iterator[Document]:
    """The documents of files and folders, one at a time, in the order of their names.

    JSON lines (also .gz) and Parquet have a field `text` or `content`, and may have `repo`, `license` and `path`; every
    other file that is UTF-8 is one document. Raises TrainingError, naming file and line, for what is malformed.
    """
    for source in sources:
        for file in source_files(source):
            for item in read_part(Part(file=str(file), root=os.fspath(source))):
                if isinstance(item, Document):
                    yield item
                elif item.reason == "unreadable":
                    raise TrainingError(
                        f'{item.source} cannot be read as a document: a line is a JSON object with a text in "text" or '
                        '"content"; every other file must be one that you may read'
                    )


def read_part(part: Part, *, max_bytes: int | None = None) -> Iterator[Document | Rejected]:
    """The documents of a part in order. Files of more than `max_bytes` that are one document are not read."""
    file = Path(part.file)
    if is_json_lines(file):
        yield from _read_json_lines(file, part)
    elif is_parquet(file):
        yield from _read_parquet(file, part)
    else:
        yield _read_text(file, Path(part.root), max_bytes)


def read_texts(file: Path) -> Iterator[str]:
    """The texts of one file of an evaluation set: a document, or of JSON lines and Parquet all strings of a record.

    Raises TrainingError for a file that is unreadable or not UTF-8; one that is binary has none.
    """
    if is_json_lines(file):
        for _, value in read_json_lines(file):
            yield "\n".join(_strings(value))
    elif is_parquet(file):
        for number, record in _parquet_rows(file):
            if isinstance(record, UnicodeDecodeError):
                raise TrainingError(f"{file}:{number} cannot be compared with: it is not UTF-8")
            yield "\n".join(_strings(record))
    else:
        item = _read_text(file, file, None)
        if isinstance(item, Document):
            yield item.text
        elif item.reason != "binary":
            raise TrainingError(f"{file} cannot be compared with: it is {item.reason}")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _read_text(file: Path, root: Path, max_bytes: int | None) -> Document | Rejected:
    size = 0
    try:
        size = file.stat().st_size
        if max_bytes is not None and size > max_bytes:
            return Rejected(source=str(file), reason="too-large", num_bytes=size)
        content = file.read_bytes()
    except OSError:  # not ours to read, or gone
        return Rejected(source=str(file), reason="unreadable", num_bytes=size)
    if b"\0" in content:
        return Rejected(source=str(file), reason="binary", num_bytes=size)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Rejected(source=str(file), reason="not-utf-8", num_bytes=size)
    home = repository_of(str(file.parent), str(root if root.is_dir() else root.parent))
    return Document(
        text=text,
        source=str(file),
        group=home.path,
        is_root=home.is_root,
        license=license_of_source(text) or home.license,
        is_code=file.suffix.lower() in CODE_SUFFIXES,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """The repository around a folder: its path, "" where there is none; whether it is the source; its licence."""

    path: str
    is_root: bool
    license: str


@lru_cache(maxsize=4096)
def repository_of(directory: str, root: str) -> Repository:
    """The nearest folder, from `directory` up to `root`, with a licence file or what a project has at its top.

    The licence is that of the nearest licence file, which may lie further up.
    """
    here = Path(directory)
    names = {entry.name for entry in os.scandir(here)}
    licences = sorted(name for name in names if LICENSE_FILE.fullmatch(name) and (here / name).is_file())
    found = dict.fromkeys(name for name in (_read_license(here / file) for file in licences) if name)
    above = repository_of(str(here.parent), root) if directory != root and here.parent != here else None
    license_name = " OR ".join(found) or (above.license if above and not licences else "")
    if licences or names & _REPOSITORY_FILES:
        return Repository(path=directory, is_root=directory == root, license=license_name)
    return above or Repository(path="", is_root=False, license="")


def _read_license(file: Path) -> str:
    with file.open("rb") as content:
        return license_of_text(content.read(65_536).decode("utf-8", "replace"))


def _lines(file: Path, begin: int, end: int | None) -> Iterator[tuple[int, int, bytes | None]]:
    """(number within the part, offset, line) of lines that begin in the part; None for one that is too long."""
    with open_bytes(file) as lines:
        offset = begin
        if begin:
            lines.seek(begin - 1)
            while (rest := lines.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                offset += len(rest)
                if end is not None and offset >= end:
                    return  # one line reaches over the whole part
            offset += len(rest) - 1  # the byte before `begin` was read too
        number = 0
        while end is None or offset < end:
            line = lines.readline(MAX_LINE_BYTES)
            if not line:
                return
            number, start = number + 1, offset
            offset += len(line)
            whole: bytes | None = line
            while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n") and (end is None or offset < end):
                line, whole = lines.readline(MAX_LINE_BYTES), None
                offset += len(line)
            if whole is None or whole.strip():
                yield number, start, whole


def _read_json_lines(file: Path, part: Part) -> Iterator[Document | Rejected]:
    is_whole = part.begin == 0 and part.end is None
    number = 0
    try:
        for number, offset, line in _lines(file, part.begin, part.end):
            source = f"{file}:{number}" if is_whole else f"{file}@{offset}"
            yield _from_record(None if line is None else _parse(line), source, 0 if line is None else len(line))
    except UNREADABLE as error:
        raise TrainingError(f"{file} cannot be read after line {number}: {error}") from error


def _parse(line: bytes | None) -> Any:
    try:
        return None if line is None else parse_json(line.decode("utf-8-sig"))
    except ValueError:
        return None


def _read_parquet(file: Path, part: Part) -> Iterator[Document | Rejected]:
    for number, record in _parquet_rows(file, (*_TEXT_FIELDS, *_GROUP_FIELDS, "license", "path"), part.begin, part.end):
        source = f"{file}:{number}"
        if isinstance(record, UnicodeDecodeError):
            yield Rejected(source=source, reason="not-utf-8", num_bytes=0)
        else:
            yield _from_record(record, source, 0)


def _parquet_rows(
    file: Path, columns: Sequence[str] | None = None, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, Any]]:
    """(number from 1, record or the error of one that is not UTF-8) of the rows of some row groups.

    columns: those to be read where they are there; one of the texts must be. None for all.
    """
    with open_parquet(file) as table:
        from pyarrow import ArrowException  # it is there, since the file was opened

        names = None if columns is None else [name for name in columns if name in table.schema_arrow.names]
        if names is not None and not set(names) & set(_TEXT_FIELDS):
            raise TrainingError(
                f'{file} has no column "text" or "content": rename the one with the text, or leave the file out'
            )
        number = sum(table.metadata.row_group(group).num_rows for group in range(begin))
        groups = list(range(begin, table.num_row_groups if end is None else end))
        try:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, row_groups=groups, columns=names):
                for row in range(batch.num_rows):
                    number += 1
                    yield number, _parquet_record(batch.slice(row, 1))
        except (OSError, ArrowException) as error:
            raise TrainingError(f"{file} cannot be read after row {number}: {error}") from error


def _parquet_record(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


def open_parquet(file: Path) -> Any:
    """The pyarrow ParquetFile of a file, a context manager. Raises TrainingError."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise TrainingError(f"{file}: reading Parquet needs pyarrow: pip install 'indexshare[train]'") from error
    try:
        return ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise TrainingError(f"{file} cannot be read as Parquet: {error}") from error


def _from_record(record: Any, source: str, num_bytes: int) -> Document | Rejected:
    fields = record if isinstance(record, Mapping) else {}
    text = next((fields[name] for name in _TEXT_FIELDS if isinstance(fields.get(name), str)), None)
    if text is None:
        return Rejected(source=source, reason="unreadable", num_bytes=num_bytes)
    if "\0" in text:
        return Rejected(source=source, reason="binary", num_bytes=num_bytes)
    declared = fields.get("license")
    path = fields.get("path")
    return Document(
        text=text,
        source=source,
        group=next((fields[name] for name in _GROUP_FIELDS if isinstance(fields.get(name), str)), ""),
        license=declared if isinstance(declared, str) else license_of_source(text),
        is_code=isinstance(path, str) and PurePath(path).suffix.lower() in CODE_SUFFIXES,
    )
