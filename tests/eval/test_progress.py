"""Progress without a terminal: lines, the first one soon."""

import pytest

from indexshare.eval import progress


def test_without_a_terminal_a_line_says_soon_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    with progress.bar("search", "candidates") as report:
        for done in (1, 4, 8, 17, 40):
            clock[0] = 5.0 * done
            report(done, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["search 4/40 candidates  3:00 left", "search 17/40 candidates  1:55 left"]
