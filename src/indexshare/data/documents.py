"""Documents from files: JSON lines, Parquet, plain text and code, one file or whole folders."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from indexshare.errors import TrainingError

_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text and where it came from: a path, with `:line` for one of many in a file. group: what is packed together."""

    text: str
    source: str
    group: str = ""


def read_documents(sources: Sequence[str | os.PathLike[str]]) -> Iterator[Document]:
    """The documents of files and folders, one at a time, in the order of their names.

    JSON lines have a field `text`; every other file is one document. Raises TrainingError, naming file and line.
    """
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise TrainingError(f"{path} does not exist; give files or folders of text, code or JSON lines")
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            yield from _read_json_lines(file) if file.suffix in _JSON_LINES else _read_text(file, path)


def _read_text(file: Path, root: Path) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    yield Document(text=text, source=str(file), group=str(root))


def _read_json_lines(file: Path) -> Iterator[Document]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise TrainingError(f'{file}:{number} is not a JSON object with a field "text"') from error
            yield Document(text=text, source=f"{file}:{number}")
