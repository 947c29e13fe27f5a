"""The demo end to end on a tiny model: what is printed, what is measured, and that nothing is left behind."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console

from indexshare.engine.llm import LLM
from indexshare.errors import MemoryLimitError, RequestError
from indexshare.eval import demo
from indexshare.eval.demo import run_demo
from indexshare.eval.progress import Pace, clock
from indexshare.eval.report import COLUMNS, DemoResult, render


def run(llm: LLM, **options: Any) -> tuple[DemoResult, str, str]:
    """The result and what went to standard output and to standard error."""
    output, errors = io.StringIO(), io.StringIO()
    options = {"num_tokens": 2048, "num_questions": 2, "table_tokens": 600} | options
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(demo, "TABLE_QUESTIONS", 2)
        patch.setattr(demo, "ANSWER_TOKENS", 4)
        patch.setattr("indexshare.eval.measure.DECODE_TOKENS", 2)
        patch.setattr("indexshare.eval.retrieval.ANSWER_TOKENS", 4)
        return run_demo(llm, **options), output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def finished(llm: LLM) -> tuple[DemoResult, str, str]:
    return run(llm)


def test_the_demo_reads_asks_and_compares(finished: tuple[DemoResult, str, str]) -> None:
    result, output, errors = finished
    assert 2048 <= result.long.num_tokens <= 2048 + demo.DOCUMENT_SLACK
    assert [each.name for each in result.table] == ["dense attention", "sparse, indexer in every layer", "IndexShare"]
    assert len({each.num_tokens for each in result.table}) == 1
    dense, every, shared = result.table
    assert dense.indexer_share == 0.0
    assert every.cache_bytes > shared.cache_bytes == dense.cache_bytes
    assert 0.0 < shared.indexer_share < 1.0
    for measurement in (*result.table, result.long):
        assert measurement.curve[0] == (0, 0.0)
        assert measurement.curve[-1][0] == measurement.num_tokens
        assert list(measurement.curve) == sorted(measurement.curve)
        assert measurement.peak_bytes is None or measurement.peak_bytes > 2**26
    assert output.count("What is the access code of") == 2
    assert output.count("✗ it is ") == 2  # the weights are random
    assert errors == ""  # there is no bar without a terminal


def test_the_table_names_every_column(finished: tuple[DemoResult, str, str]) -> None:
    """On a terminal of 80 columns, and nothing is cut off."""
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(render(finished[0]))
    table = console.export_text()
    assert all(word in table for column in COLUMNS for word in column.split())
    assert table.count("0/2") == 4
    assert "…" not in table


def test_a_result_travels_as_json(finished: tuple[DemoResult, str, str]) -> None:
    result = finished[0]
    assert msgspec.json.decode(msgspec.json.encode(result), type=DemoResult) == result


def test_a_short_document_is_its_own_table(llm: LLM) -> None:
    result, output, errors = run(llm, num_questions=1, table_tokens=2300, on_stderr=True)
    assert result.table[-1].num_tokens == result.long.num_tokens
    assert result.table[-1].answers == result.long.answers
    assert len(result.needles) == 1
    assert (output, errors.count("What is")) == ("", 1)


def test_the_page_holds_more_lengths(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MAP_LENGTHS", (300, 8192))
    monkeypatch.setattr(demo, "MAP_QUESTIONS", 2)
    result, output, _ = run(llm, num_questions=1, html=tmp_path / "demo.html")
    assert [each.num_tokens for each in result.needles] == [
        300,
        result.table[-1].num_tokens,
        result.long.num_tokens,
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["demo.html"]
    assert str(tmp_path / "demo.html") in output


def test_the_pictures_are_files_of_their_own(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MAP_LENGTHS", (300,))
    monkeypatch.setattr(demo, "MAP_QUESTIONS", 2)
    directory = tmp_path / "docs" / "images"
    result, output, _ = run(llm, num_questions=1, pictures=directory)
    assert result.needles[0].num_tokens == 300
    assert sorted(path.name for path in directory.iterdir()) == ["needles.svg", "time.svg"]
    for path in directory.iterdir():
        ElementTree.parse(path)
        assert str(path) in output


def test_what_cannot_be_done_is_refused_at_once(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="1,048,576"):
        run(llm, num_tokens=2**20 + 1)
    with pytest.raises(RequestError, match="at least one question"):
        run(llm, num_questions=0)
    with pytest.raises(RequestError, match="no directory"):
        run(llm, html=tmp_path / "missing" / "demo.html")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="not a directory"):
        run(llm, pictures=tmp_path / "file")
    monkeypatch.setattr("indexshare.runtime.available_memory_bytes", lambda device: 256 * 2**20 + 1000)
    with pytest.raises(MemoryLimitError, match="bytes of cache"):
        run(llm, num_tokens=2**20)


def test_an_interrupt_leaves_nothing(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("indexshare.eval.demo._Teller.ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(llm, html=tmp_path / "demo.html")
    assert not list(tmp_path.iterdir())
    assert llm.generate([5, 6, 7], max_new_tokens=2).token_ids


def test_text_of_a_model_cannot_command_the_terminal() -> None:
    assert demo._visible("a\x1b[2Jb\n\x07é") == "a\ufffd[2Jb\n\ufffdé"


def test_the_time_left_knows_that_reading_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("indexshare.eval.progress.time.perf_counter", lambda: now[0])
    pace = Pace()
    assert pace.remaining(100) == 0.0
    for done in range(10, 50, 10):
        now[0] = 2.0 * done + 0.5 * done**2
        pace.note(done)
    whole = 2.0 * 100 + 0.5 * 100**2
    assert pace.remaining(100) == pytest.approx(whole - now[0])
    assert (clock(65), clock(7207.4)) == ("1:05", "2:00:07")
