"""Documents of every kind of file: what is read, in which order, and that nothing outside is reached."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.corpus import GPL, MIT
from hypothesis import given
from hypothesis import strategies as st

from indexshare.data import documents
from indexshare.data.documents import Document, Part, Rejected, read_documents, read_part, read_texts
from indexshare.data.files import source_files
from indexshare.data.plan import make_plan
from indexshare.errors import TrainingError


def test_folders_are_walked_in_order_without_links_and_packages(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in (
        "b/z.txt",
        "b.txt",
        "a/x.txt",
        ".git/config",
        "node_modules/m.js",
        "mine/lib/site.py",
        "mine/pyvenv.cfg",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    assert [file.relative_to(root).as_posix() for file in source_files(root)] == ["a/x.txt", "b/z.txt", "b.txt"]
    assert [document.text for document in read_documents([root])] == ["a/x.txt", "b/z.txt", "b.txt"]


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=12),
    cuts=st.lists(st.integers(0, 600), max_size=5),
    ends=st.booleans(),
)
def test_parts_of_a_file_have_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cuts: list[int], ends: bool
) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
    file.write_bytes((content + "\n" * ends).encode())
    size = file.stat().st_size
    bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
    found = [
        item.text if isinstance(item, Document) else "\0"
        for begin, end in itertools.pairwise(bounds)
        for item in read_part(Part(file=str(file), root=str(file), begin=begin, end=end))
    ]
    assert found == ["\0" if "\0" in line else line for line in lines]


def test_lines_that_are_too_long_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 64)
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in ("first", "x" * 500, "last")]
    file.write_text("\n".join(lines))
    for begin in (0, 10, 40, 300):
        items = list(read_part(Part(file=str(file), root=str(file), begin=begin, end=file.stat().st_size)))
        texts = [item.text for item in items if isinstance(item, Document)]
        assert texts == (["first", "last"] if begin == 0 else ["last"])
        assert sum(isinstance(item, Rejected) for item in items) == (begin < 40)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": 3}', '"text"', '{"text": "\\ud800"}', "\xff"])
def test_lines_that_are_not_documents(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line.encode("latin-1"))
    good, bad = read_part(Part(file=str(file), root=str(file)))
    assert isinstance(good, Document) and isinstance(bad, Rejected) and bad.reason == "unreadable"
    with pytest.raises(TrainingError, match=r"a\.jsonl:2"):
        list(read_documents([file]))


def test_parquet_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table(
        {
            "content": [f"text {n}" for n in range(10)],
            "repo_name": ["r"] * 10,
            "license": ["MIT"] * 10,
            "path": ["a.py"] * 9 + ["a.txt"],
            "size": list(range(10)),
        }
    )
    file = tmp_path / "a.parquet"
    pq.write_table(table, file, row_group_size=4)
    whole = list(read_documents([file]))
    assert [document.text for document in whole] == [f"text {n}" for n in range(10)]
    assert whole[0] == Document(text="text 0", source=f"{file}:1", group="r", license="MIT", is_code=True)
    assert not whole[9].is_code
    monkeypatch.setattr("indexshare.data.plan.PART_BYTES", 100)
    parts = make_plan([str(file)], tmp_path / "out").parts
    assert len(parts) == 3 and [item for part in parts for item in read_part(part[0])] == whole
    assert list(read_texts(file))[1] == "text 1\nr\nMIT\na.py"
    pq.write_table(table.select(["size"]), file)
    with pytest.raises(TrainingError, match='no column "text" or "content"'):
        list(read_documents([file]))
    file.write_bytes(b"PAR1 but not really")
    with pytest.raises(TrainingError, match="is not Parquet"):
        list(read_documents([file]))


def test_a_gzip_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "one"}\n' * 5000)[:-20])
    with pytest.raises(TrainingError, match=r"a\.jsonl\.gz cannot be read after line"):
        list(read_documents([file]))


def test_repositories_and_their_licences(tmp_path: Path) -> None:
    for name, text in {
        "LICENSE": MIT,
        "main.py": "print(1)",
        "docs/guide.md": "words",
        "package/pyproject.toml": "[project]",
        "package/a.py": "print(2)",
        "vendor/COPYING": GPL,
        "vendor/b.py": "print(3)",
        "vendor/c.py": "# SPDX-License-Identifier: Apache-2.0\nprint(4)",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {
        os.path.relpath(d.source, tmp_path): (os.path.relpath(d.group, tmp_path), d.is_root, d.license)
        for d in read_documents([tmp_path])
    }
    assert found["main.py"] == found["docs/guide.md"] == (".", True, "MIT")
    assert found["package/a.py"] == ("package", False, "MIT")
    assert found["vendor/b.py"] == ("vendor", False, "GPL-3.0")
    assert found["vendor/c.py"] == ("vendor", False, "Apache-2.0")
    (document,) = read_documents([tmp_path / "docs"])
    assert (document.group, document.license) == ("", "")
