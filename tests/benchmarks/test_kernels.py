"""The benchmark of the kernels and the gate against slow ones, without measuring anything that has to be right."""

import io
import json
import math
from pathlib import Path

import bench_check
import kernel_cases
import kernels
import pytest
import torch
from bench_check import better, compare, report
from ceilings import MEMORY, PRODUCTS, far_bytes
from kernel_cases import Case, all_cases
from quiet import Patience
from rich.console import Console

from indexshare.kernels import native, registry

CEILINGS = dict.fromkeys((MEMORY, *PRODUCTS), 1e9)

compiled = pytest.mark.skipif(native.enable() is not None, reason="there is no C++ compiler")


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def make_case(name: str = "linear small", wrong: str | None = None) -> Case:
    return Case(
        name=name,
        operation="linear",
        products="bfloat16",
        num_bytes=1e6,
        num_operations=2e6,
        prepare=lambda: [lambda: None],
        check=lambda: wrong,
        is_quick=True,
    )


def test_a_share_falls_or_rises_only_beyond_the_tolerance() -> None:
    stored = {"same": 0.8, "a little lower": 0.8, "lower": 0.8, "a little higher": 0.8, "higher": 0.8, "gone": 0.5}
    found = {"same": 0.8, "a little lower": 0.69, "lower": 0.67, "a little higher": 0.91, "higher": 0.93, "new": 0.1}
    changes = compare(stored, found)
    assert changes.fallen == ("lower",)
    assert changes.risen == ("higher",)
    assert changes.new == ("new",)
    assert changes.gone == ("gone",)


@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_the_tolerance_is_relative(tolerance: float) -> None:
    stored = {"slow": 0.02, "fast": 0.9}
    for factor, falls in ((1 - tolerance - 0.01, True), (1 - tolerance + 0.01, False)):
        found = {name: share * factor for name, share in stored.items()}
        assert bool(compare(stored, found, tolerance).fallen) == falls


def test_of_two_runs_the_better_counts() -> None:
    assert better({"a": 0.5, "b": 0.7}, {"a": 0.6, "c": 0.9}) == {"a": 0.6, "b": 0.7}


def test_a_slow_kernel_is_measured_three_times_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answers = iter([{"a": 0.4, "b": 0.4}, {"a": 0.5, "b": 0.8}, {"a": 0.6}, {"a": 0.3}, {"a": 1.0}])

    def shares(cases: list[Case], console: Console) -> dict[str, float]:
        asked.append([case.name for case in cases])
        return next(answers)

    monkeypatch.setattr(bench_check, "_shares", shares)
    cases = [make_case("a"), make_case("b")]
    assert bench_check._measure(cases, {"a": 0.8, "b": 0.8}, silent()) == {"a": 0.6, "b": 0.8}
    assert asked == [["a", "b"], ["a", "b"], ["a"], ["a"]]


def test_the_verdict_names_the_kernel() -> None:
    console = silent()
    assert report({"linear": 0.8}, {"linear": 0.6}, console) == 1
    assert "slower: linear: 80% of the ceiling, now 60%" in printed(console)
    console = silent()
    assert report({"linear": 0.6}, {"linear": 0.8}, console) == 0
    assert "BENCH_ARGUMENTS=--update" in printed(console)


@compiled
def test_an_unknown_processor_passes_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "ratios.json"
    stored.write_text(json.dumps({"scalar of another maker": {"linear": 0.5}}))
    monkeypatch.setattr(bench_check, "RATIOS", stored)
    assert bench_check.main(["--threads", "1"]) == 0
    assert "no shares are stored for this processor" in capsys.readouterr().err


def test_stored_shares_are_of_cases_that_exist() -> None:
    names = {case.name for case in all_cases(kernel_cases.OPERATIONS, quick=True)}
    for kind, shares in json.loads(bench_check.RATIOS.read_text()).items():
        assert set(shares) == names, f"{kind}: run `make bench-check BENCH_ARGUMENTS=--update`"
        assert all(0 < share < 2 for share in shares.values())


def test_the_ceiling_that_takes_longer_decides() -> None:
    case = make_case()
    assert case.seconds_at(CEILINGS) == pytest.approx(2e-3)
    assert case.bound(CEILINGS) == "bfloat16"
    slow_memory = CEILINGS | {MEMORY: 1e8}
    assert case.seconds_at(slow_memory) == pytest.approx(1e-2)
    assert case.bound(slow_memory) == MEMORY


@compiled
def test_a_wrong_result_stops_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "all_cases", lambda *_: [make_case(), make_case("linear broken", wrong="all zeros")])
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("a speed was measured"))
    assert kernels.main(["--threads", "1"]) == 1
    output = capsys.readouterr()
    assert "linear broken: all zeros" in output.err
    assert output.out == ""


@compiled
@pytest.mark.parametrize("operation", kernel_cases.OPERATIONS)
def test_the_checks_find_a_broken_kernel(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in all_cases([operation], quick=True) if "nano" in case.name or "int8" in case.name]
    assert kernels.check(cases, silent()) == {}
    twin = registry.get(operation).twins[0]

    def broken(*arguments: object) -> torch.Tensor:
        result = twin.function(*arguments)
        return result.roll(1, -1) if operation == "index_select" else result * 1.05

    wrong_twin = registry.Twin(name=twin.name, devices=twin.devices, function=broken, supports=twin.supports)
    monkeypatch.setattr(registry.get(operation), "twins", [wrong_twin])
    assert set(kernels.check(cases, silent())) == {case.name for case in cases}


@compiled
@pytest.mark.parametrize("name", kernel_cases.FORMATS)
def test_bytes_are_those_of_the_packed_weight(name: str) -> None:
    shape = (256, 1024)
    packed = kernel_cases._packed(kernel_cases.random_weight(name, shape))
    assert packed.nbytes == kernel_cases._weight_bytes(name, shape)


def test_names_are_unique_and_begin_with_the_operation() -> None:
    cases = all_cases(kernel_cases.OPERATIONS, quick=False)
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.name.split()[0] == case.operation for case in cases)
    assert {case.name for case in all_cases(kernel_cases.OPERATIONS, quick=True)} < {case.name for case in cases}


@compiled
def test_figures_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Meter:
        best = CEILINGS

        def measure(self) -> None:
            turns.append("ceilings")

    turns: list[str] = []
    monkeypatch.setattr(kernels, "CeilingMeter", Meter)
    monkeypatch.setattr(kernels, "QUICK_SECONDS", 0.0)
    cases = [make_case("linear a"), make_case("linear b")]
    figures, ceilings = kernels.measure(cases, quick=True, progress=silent(), patience=Patience(0))
    assert turns == ["ceilings"] * kernels.QUICK_REPEATS
    assert [len(figure.seconds) for figure in figures] == [kernels.QUICK_REPEATS] * 2
    assert all(math.isfinite(figure.share) and figure.share <= figure.best_share for figure in figures)
    machine = kernels.describe_machine()
    kernels.write_json(tmp_path / "run.json", figures, ceilings, machine)
    assert len(json.loads((tmp_path / "run.json").read_text())["figures"]) == 2
    console = silent()
    console.print(kernels.render(figures, ceilings, machine))
    assert "linear b" in printed(console)


def test_arguments_go_round() -> None:
    seen: list[int] = []
    run = kernel_cases.in_turn(seen.append, [(1,), (2,), (3,)])
    for _ in range(5):
        run()
    assert seen == [1, 2, 3, 1, 2]
    assert far_bytes() >= 128 * 2**20
