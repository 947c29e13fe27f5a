"""The soak test's own judgement: what it takes for right, and what it reports."""

import json
from pathlib import Path
from typing import Any

import pytest
import soak
from rich.console import Console
from serving_traffic import Answer, Exchange, Tally, check, joined_answer, whole_answer
from soak import Sample, Soak, idle_violations, memory_violations

CALL = {"name": "add", "arguments": '{"a": 1}'}
IDLE = {
    "running": 0.0, "waiting": 0.0, "live_pages": 0.0, "free_pages": 3.0, "cached_pages": 5.0, "pages": 8.0, "5xx": 0.0,
    "preempted_total": 1.0, "evicted_pages_total": 1.0,
}  # fmt: skip


def chunk(**delta: Any) -> dict[str, Any]:
    reason = delta.pop("reason", None)
    return {"choices": [{"delta": delta, "finish_reason": reason}]}


def test_streamed_and_whole_answers_are_the_same_answer() -> None:
    calls = [{"id": "x", "function": CALL}]
    message = {"content": "Hello", "reasoning_content": "so", "tool_calls": calls}
    whole = whole_answer({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    chunks = [
        chunk(role="assistant"), chunk(reasoning_content="so"), chunk(content="Hel"), chunk(content="lo"),
        chunk(tool_calls=calls), chunk(reason="tool_calls"), {"choices": []},
    ]  # fmt: skip
    expected = Answer(text="Hello", reasoning="so", calls=(("add", {"a": 1}),), reason="tool_calls")
    assert whole == joined_answer(chunks) == expected
    text = {"choices": [{"text": "abc", "finish_reason": "length"}]}
    assert whole_answer(text) == joined_answer([text]) == Answer(text="abc", reason="length")


def test_another_answer_than_the_greedy_one_is_a_violation() -> None:
    tally = Tally()
    exchange = Exchange(name="x", path="/", body={}, expected=Answer(text="a", reason="stop"))
    check(exchange, Answer(text="a", reason="stop"), tally)
    assert not tally.violations
    check(exchange, Answer(text="b", reason="stop"), tally)
    check(exchange, Answer(text="a", reason="length"), tally)
    assert tally.num_violations == 2 and "is not" in tally.violations[0]


@pytest.mark.parametrize(
    ("answer", "num_violations"),
    [
        (Answer(text='{"name": "x", "count": 1, "found": true}', reason="stop"), 0),
        (Answer(text='{"name": "x", "cou', reason="length"), 0),
        (Answer(text='{"name": "x"}', reason="stop"), 1),
        (Answer(text='{"name": "x', reason="stop"), 1),
    ],
)
def test_the_first_constrained_answer_follows_its_schema_and_later_ones_equal_it(
    answer: Answer, num_violations: int
) -> None:
    tally, exchange = Tally(), Exchange(name="schema", path="/", body={})
    check(exchange, answer, tally)
    assert tally.num_violations == num_violations
    check(exchange, answer, tally)
    assert tally.num_violations == num_violations
    check(exchange, Answer(text="{}", reason="stop"), tally)
    assert tally.num_violations == num_violations + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"running": 1.0}, "1 running at the end"),
        ({"live_pages": 2.0}, "2 live_pages at the end"),
        ({"cached_pages": 4.0}, "3 free and 4 cached of 8 pages"),
        ({"5xx": 2.0}, "2 requests were answered with 5xx"),
        ({"preempted_total": 0.0}, "preempted_total is 0"),
    ],
)
def test_what_is_left_at_the_end_is_a_violation(changes: dict[str, float], message: str | None) -> None:
    found = idle_violations(IDLE | changes)
    assert len(found) == (message is not None) and (message is None or message in found[0])


def sample(seconds: float, mebibytes: float) -> Sample:
    return Sample(seconds=seconds, rss_bytes=int(mebibytes * soak.MIB), engine=IDLE)


def test_memory_may_grow_before_the_warm_up_is_over_and_not_after() -> None:
    samples = [sample(5, 100), *(sample(second, 200) for second in (12, 15, 18)), sample(40, 300)]
    assert memory_violations(samples, sample(61, 209), minutes=1) == []
    assert memory_violations(samples, sample(61, 211), minutes=1) == ["memory grew from 200 to 211 MiB"]
    assert "run it for longer" in memory_violations(samples[:1], sample(61, 100), minutes=1)[0]


def test_ready_may_say_503_and_nothing_else_may() -> None:
    name = 'indexshare_requests_total{{method="GET",route="{}",status="{}"}}'
    assert soak._is_failure(name.format("/v1/completions", 500))
    assert not soak._is_failure(name.format("/ready", 503)) and not soak._is_failure(name.format("/v1/x", 400))


def test_the_report_names_violations_and_the_file_has_memory_over_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Soak(minutes=1, samples=[sample(0, 100), sample(5, 110)], last=sample(61, 105), exit_seconds=0.5)
    found.tally.statuses.update({200: 7, 400: 2})
    found.tally.finished.update({"stream": 7, "bad": 2})
    found.tally.violation("[not markup] wrong")
    soak.report(found, Console(width=120))
    shown = capsys.readouterr().out
    assert "200: 7, 400: 2" in shown and "- [not markup] wrong" in shown and "110 at most, 105 at the end" in shown
    (tmp_path / "soak.json").write_text(json.dumps(soak.to_json(found)))
    assert json.loads((tmp_path / "soak.json").read_text())["rss"] == [[0, 100 * soak.MIB], [5, 110 * soak.MIB]]
