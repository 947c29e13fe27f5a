"""Which twin runs, why, how often and for how long."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from indexshare.errors import KernelError
from indexshare.kernels import ops, registry
from indexshare.kernels.registry import Call, Operation, Twin


def takes(*_: Any, **__: Any) -> None:
    return None


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operation[[int], int]]:
    """An operation of its own: the specification doubles."""
    monkeypatch.setattr(registry, "_operations", dict(registry._operations))

    def double_it(x: int) -> int:
        """Twice x."""
        return 2 * x

    yield registry.operation(double_it)
    registry.hits.pop(("double_it", "torch"), None)


def twin(name: str, result: int, supports: Any = takes) -> Twin:
    return Twin(name=name, devices=("cpu",), function=lambda x: result, supports=supports)


def refuses_large(x: int) -> str | None:
    return "x is larger than 9" if x > 9 else None


def test_the_specification_runs_when_there_is_no_twin(double: Operation[[int], int]) -> None:
    assert double(4) == 8
    assert double.__doc__ == "Twice x."
    assert registry.hits["double_it", "torch"] == 1


def test_an_automatic_choice_takes_the_last_twin_that_can(double: Operation[[int], int]) -> None:
    registry.register("double_it", twin("first", 1))
    registry.register("double_it", twin("second", 2, refuses_large))
    assert double(4) == 2
    assert double(40) == 1
    assert registry.hits["double_it", "second"] == registry.hits["double_it", "first"] == 1


def test_an_automatic_choice_falls_back_to_the_specification(double: Operation[[int], int]) -> None:
    registry.register("double_it", twin("small", 1, refuses_large))
    assert double(40) == 80


def test_an_explicit_choice_works_or_raises(double: Operation[[int], int]) -> None:
    registry.register("double_it", twin("small", 1, refuses_large))
    registry.register("double_it", twin("other", 2))
    with registry.use("double_it", "small"):
        assert double(4) == 1
        with pytest.raises(KernelError, match=r"'small' was asked for but cannot run: x is larger than 9"):
            double(40)
        with registry.use("double_it", "torch"):
            assert double(40) == 80
        assert double(4) == 1
    assert double(4) == 2


def test_an_exception_is_never_a_reason_to_fall_back(double: Operation[[int], int]) -> None:
    def fail(x: int) -> int:
        raise ZeroDivisionError("the twin is broken")

    registry.register("double_it", Twin(name="broken", devices=("cpu",), function=fail, supports=takes))
    with pytest.raises(ZeroDivisionError, match="the twin is broken"):
        double(4)


def test_an_explicit_choice_ends_with_its_block(double: Operation[[int], int]) -> None:
    registry.register("double_it", twin("other", 2))
    with pytest.raises(RuntimeError), registry.use("double_it", "torch"):
        raise RuntimeError
    assert double(4) == 2


def test_unknown_names(double: Operation[[int], int]) -> None:
    with pytest.raises(KernelError, match=r"no operation 'nothing'; there are: .*index_select"):
        registry.get("nothing")
    with (
        pytest.raises(KernelError, match="double_it has no twin 'nothing'; choose one of: torch"),
        registry.use("double_it", "nothing"),
    ):
        pass


def test_names_are_unique(double: Operation[[int], int]) -> None:
    registry.register("double_it", twin("other", 2))
    for name in ("other", "torch"):
        with pytest.raises(KernelError, match=f"'{name}' exists already"):
            registry.register("double_it", twin(name, 1))
    registry.unregister("double_it", "other")
    registry.unregister("double_it", "other")
    assert double(4) == 8


def test_timing_counts_inside_its_block(double: Operation[[int], int]) -> None:
    double(1)
    with registry.timing() as outer:
        double(1)
        with registry.timing() as inner:
            double(1)
    double(1)
    assert set(inner) == set(outer) == {"double_it"}
    assert 0 < inner["double_it"] < outer["double_it"] < 1


def test_a_watcher_sees_each_call_and_gives_its_result(double: Operation[[int], int]) -> None:
    registry.register("double_it", twin("other", 2))
    seen: list[Call] = []

    def watcher(call: Call) -> Any:
        seen.append(call)
        return call.run() + call.run_specification()

    with registry.watch(watcher):
        assert double(4) == 10
        with registry.watch(Call.run_specification):
            assert double(4) == 8
    assert double(4) == 2
    assert [(call.operation.name, call.twin, call.args) for call in seen] == [("double_it", "other", (4,))]


def test_describe_says_what_runs_and_why(double: Operation[[int], int]) -> None:
    registry.register("double_it", twin("other", 2))

    def line(device: str) -> tuple[str, str]:
        (choice,) = [c for c in registry.describe(("cpu", "cuda")) if (c.operation, c.device) == ("double_it", device)]
        return choice.twin, choice.reason

    assert line("cpu") == ("other", "fastest twin for this device")
    assert line("cuda")[0] == "torch"
    with registry.use("double_it", "torch"):
        assert line("cpu") == ("torch", "chosen explicitly")


def test_the_operations_of_the_model_are_registered() -> None:
    names = set(registry.names())
    assert names | {"run_layers"} == {choice.operation for choice in registry.describe(("cpu",))}
    assert names == {
        "cache_write",
        "index_select",
        "indexer_loss",
        "layer_norm",
        "linear",
        "rope_table",
        "mla_dense",
        "mla_expanded",
        "mla_sparse",
        "mla_sparse_backward",
        "moe_experts",
        "moe_route",
        "rms_norm",
        "rope",
    }
    for name in names:
        documentation = registry.get(name).__doc__
        assert documentation, f"{name}: shapes, dtypes and edge cases belong in the docstring"
    assert registry.get("rope") is ops.rope


def test_specifications_run_without_twins() -> None:
    calls = registry.hits["rope_table", "torch"]
    with registry.specifications():
        ops.rope_table(torch.arange(3), 4, 1e4)
    assert registry.hits["rope_table", "torch"] == calls + 1
