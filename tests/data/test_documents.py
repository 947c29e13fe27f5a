"""Documents of every kind of file: what is read, in which order, and that nothing outside is reached."""

import gzip
import io
import itertools
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.corpus import GPL, MIT, prose
from hypothesis import given
from hypothesis import strategies as st

from indexshare.data import documents
from indexshare.data.chats import read_chats
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
    with pytest.raises(TrainingError, match="cannot be read as Parquet"):
        list(read_documents([file]))


def test_small_row_groups_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {n:02}" for n in range(100)]}), file, row_group_size=1)
    size = pq.read_metadata(file).row_group(0).total_byte_size
    monkeypatch.setattr("indexshare.data.plan.PART_BYTES", 30 * size)
    parts = make_plan([str(file)], tmp_path / "out").parts
    assert [(part.begin, part.end) for (part,) in parts] == [(0, 30), (30, 60), (60, 90), (90, 100)]
    found = [item for (part,) in parts for item in read_part(part)]
    assert [item.text for item in found if isinstance(item, Document)] == [f"text {n:02}" for n in range(100)]


def test_a_row_group_is_never_wholly_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    texts = pa.table({"text": [os.urandom(8).hex() * 500 for _ in range(4000)]})  # 32 MB
    pq.write_table(texts, file, compression="none", use_dictionary=False)
    assert pq.read_metadata(file).num_row_groups == 1
    del texts
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_documents([file])]
    assert len(held) == 4000 and max(held) < 16_000_000


def test_parquet_that_is_not_utf_8_or_damaged_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    ends = pa.py_buffer(np.asarray([0, 3, 6, 9], np.int32).tobytes())
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(3, ends, pa.py_buffer(b"one\xff\xfe\xfdtwo"))}), file)
    first, bad, last = read_part(Part(file=str(file), root=str(file)))
    assert isinstance(first, Document) and isinstance(last, Document) and (first.text, last.text) == ("one", "two")
    assert bad == Rejected(source=f"{file}:2", reason="not-utf-8", num_bytes=0)
    with pytest.raises(TrainingError, match=r"a\.parquet:2 cannot be compared with: it is not UTF-8"):
        list(read_texts(file))
    pq.write_table(pa.table({"text": [os.urandom(50).hex() for _ in range(5000)]}), file, use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = b"\xff" * 500
    file.write_bytes(content)
    with pytest.raises(TrainingError, match=r"a\.parquet cannot be read after row"):
        list(read_documents([file]))


def test_gzip_files_that_are_cut_off_or_damaged_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    good = gzip.compress("".join(f'{{"text": "{prose(n)!r}"}}\n' for n in range(50)).encode())
    bad = good[:10] + b"\x07" + good[11:]  # the first block is of a type that does not exist
    with pytest.raises(zlib.error):
        gzip.decompress(bad)
    for content in (good[:-20], bad):
        file.write_bytes(content)
        for read in (read_documents, read_chats):
            with pytest.raises(TrainingError, match=r"a\.jsonl\.gz"):
                list(read([file]))
        with pytest.raises(TrainingError, match=r"a\.jsonl\.gz cannot be read after line"):
            list(read_texts(file))


def test_names_in_capitals_and_other_names_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "B.JSON.GZ").write_bytes(gzip.compress(b'{"text": "three"}'))
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "C.PARQUET")
    (tmp_path / "d.json").write_text('{"text": "five"}')
    assert [document.text for document in read_documents([tmp_path])] == [
        "one",
        "two",
        "three",
        "four",
        '{"text": "five"}',
    ]


def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    assert [document.text for document in read_documents([tmp_path])] == ["one", "two", "three"]
    assert list(read_texts(tmp_path / "a.jsonl")) == ["one", "two"]


def test_a_line_over_many_parts_is_not_read_in_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "x" * 100_000}) + '\n{"text": "last"}\n')
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 64)
    sizes: list[int] = []

    class Counting(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            sizes.append(len(line))
            return line

    monkeypatch.setattr(documents, "open_bytes", lambda path: Counting(path.read_bytes()))
    for begin in (0, 1000, 2000):
        sizes.clear()
        items = list(read_part(Part(file=str(file), root=str(file), begin=begin, end=begin + 1000)))
        assert len(items) == (begin == 0) and sum(sizes) < 1200
    (last,) = read_part(Part(file=str(file), root=str(file), begin=99_000, end=file.stat().st_size))
    assert isinstance(last, Document) and last.text == "last"


def test_what_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "c.png").write_bytes(b"\x89PNG\0")
    assert list(read_texts(tmp_path / "a.txt")) == ["words"] and list(read_texts(tmp_path / "c.png")) == []
    with pytest.raises(TrainingError, match=r"b\.txt cannot be compared with: it is not-utf-8"):
        list(read_texts(tmp_path / "b.txt"))
    with pytest.raises(TrainingError, match=r"gone\.jsonl cannot be read after line 0"):
        list(read_texts(tmp_path / "gone.jsonl"))
    with pytest.raises(TrainingError, match=r"gone\.parquet cannot be read as Parquet"):
        list(read_texts(tmp_path / "gone.parquet"))
    (gone,) = read_part(Part(file=str(tmp_path / "gone.txt"), root=str(tmp_path)))
    assert gone == Rejected(source=str(tmp_path / "gone.txt"), reason="unreadable", num_bytes=0)
    scan = os.scandir

    def refuse(path: os.PathLike[str]) -> Any:
        if Path(path).name == "folder":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(TrainingError, match=r"cannot be read: .*Permission denied.*folder'; make it readable"):
        list(source_files(tmp_path))


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
