"""`indexshare data build` at the command line."""

import json
from pathlib import Path

import pytest
from data.corpus import write_corpus

from indexshare import cli
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import open_rows
from indexshare.engine.resolve import packaged_model


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(["data", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_build_writes_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = str(write_corpus(tmp_path / "corpus")), str(tmp_path / "out")
    code, out, _ = run(capsys, "build", corpus, "--output", output, "--workers", "1")
    assert code == 0
    for text in ("near-duplicate", "again.txt", "held_out", "report.html", "MIT"):
        assert text in out.replace("\n", "")  # a path may be wrapped
    page = (tmp_path / "out" / "report.html").read_text()
    assert "is the same as an earlier document but for white space" in page and "river" not in page
    code, out, _ = run(capsys, "build", corpus, "--output", output, "--workers", "1", "--json")
    report = json.loads(out)
    assert code == 0 and report == json.loads((tmp_path / "out" / "report.json").read_text())
    rows = open_rows([output], Tokenizer.from_directory(packaged_model()), length=64)
    assert rows.num_rows == (report["train"]["tokens"] - 1) // 64


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("words")
    for arguments, message in (
        (["nowhere", "--output", str(tmp_path / "out")], "nowhere does not exist"),
        ([str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), "--ngram", "1"], "--ngram must be"),
        ([str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), "--tokenizer", "none"], "no model at 'none'"),
        (["--output", str(tmp_path / "out")], "give at least one source"),
    ):
        code, _, err = run(capsys, "build", *arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err


def test_help_names_the_reasons_to_care(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "build", "--help")
    assert code == 0 and "--licenses" in out and "--against" in out and "indexshare data build" in out
