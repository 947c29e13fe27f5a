"""The doctor passes healthy models and names what is wrong with the others."""

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console
from torch import Tensor

from indexshare import cli
from indexshare.errors import RequestError
from indexshare.eval.doctor import DoctorReport, UnhealthyError, diagnose, render, require_healthy
from indexshare.kernels import ops, registry
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.recipes import tiny
from indexshare.model.weights import save_model

LENGTHS = (6, 80)  # around index_topk = 8; 80 tokens are two pages


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = GlmForCausalLM(tiny(initializer_range=0.15))
    model.init_weights(3)
    directory = tmp_path_factory.mktemp("model")
    save_model(model, directory)
    return directory


@contextmanager
def broken(operation: str, function: Callable[..., Any]) -> Iterator[None]:
    """An automatic choice takes this twin for every call."""
    twin = registry.Twin(name="broken", devices=("cpu",), function=function, supports=lambda *_, **__: None)
    registry.register(operation, twin)
    try:
        yield
    finally:
        registry.unregister(operation, "broken")


def text(report: DoctorReport) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(report))
    return console.export_text()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_healthy_model_passes(directory: Path, dtype: str) -> None:
    report = diagnose(directory, dtype=dtype, lengths=(6, 70, 80))
    assert report.ok, text(report)
    assert not report.failed
    ran = {line.operation for line in report.lines}
    operations = set(registry.names())
    not_run = ("indexer_loss", "mla_expanded", "mla_sparse_backward")  # of training; for more than 64 tokens at once
    assert ran == (operations - set(not_run)) | {"attention layer", "logits"}
    assert report.not_run == not_run
    shown = " ".join(text(report).split())
    assert f"did not run: {', '.join(not_run)}" in shown
    assert shown.endswith("every operation of inference that ran is right")
    for operation, lengths in (("mla_dense", {6}), ("mla_sparse", {70, 80}), ("index_select", {70, 80})):
        assert {line.length for line in report.lines if line.operation == operation} == lengths
    assert all(operation in text(report) for operation in ran)
    assert report.model in text(report).replace("\n", "")
    assert msgspec.json.decode(msgspec.json.encode(report))["ok"] is True


def wrong_sparse(query: Tensor, latents: Tensor, selection: Tensor, scale: float, latent_dim: int) -> Tensor:
    return ops.mla_sparse.specification(query, latents, selection, 1.1 * scale, latent_dim)


def wrong_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return 1.05 * ops.rms_norm.specification(x, weight, eps)


def wrong_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return ops.rope.specification(x, cos, sin, not interleaved)


def wrong_select(query: Tensor, weights: Tensor, keys: Tensor, layout: Any, topk: int) -> Tensor:
    return ops.index_select.specification(query, weights.abs(), keys, layout, topk)


def short_select(query: Tensor, weights: Tensor, keys: Tensor, layout: Any, topk: int) -> Tensor:
    return ops.index_select.specification(query, weights, keys, layout, topk - 1)


def wrong_write(pool: Tensor, rows: Tensor, values: Tensor) -> None:
    ops.cache_write.specification(pool, rows.roll(1), values)


def greedy_write(pool: Tensor, rows: Tensor, values: Tensor) -> None:
    pool.fill_(1.0)
    ops.cache_write.specification(pool, rows, values)


def biased_route(hidden: Tensor, weight: Tensor, bias: Tensor, count: int, normalise: bool, scale: float) -> Any:
    experts, gates = ops.moe_route.specification(hidden, weight, bias, count, normalise, scale)
    return experts, gates.flip(-1)


def wrong_experts(hidden: Tensor, experts: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return ops.moe_experts.specification(hidden, experts, 1.1 * gates, gate_up, down)


def nan_linear(x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear.specification(x, weight) * float("nan")


def raising_dense(*_: Any) -> Tensor:
    raise RuntimeError("the launch failed")


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("mla_sparse", wrong_sparse),
        ("rms_norm", wrong_norm),
        ("rope", wrong_rope),
        ("index_select", wrong_select),
        ("index_select", short_select),
        ("cache_write", wrong_write),
        ("cache_write", greedy_write),
        ("moe_route", biased_route),
        ("moe_experts", wrong_experts),
        ("linear", nan_linear),
        ("mla_dense", raising_dense),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_operation_is_named(directory: Path, operation: str, function: Callable[..., Any], dtype: str) -> None:
    """It, and only it: everything else is measured from the same inputs."""
    with broken(operation, function):
        report = diagnose(directory, dtype=dtype, lengths=LENGTHS)
    assert not report.ok
    assert report.failed == (operation,)
    assert all(line.twin == "broken" for line in report.lines if not line.ok)
    assert f"{operation} (broken)" in text(report)
    assert "FAIL" in text(report)
    assert msgspec.json.decode(msgspec.json.encode(report))["ok"] is False


def unsupported(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification of an operation as on a device that lacks something: only the reference in fp64 runs."""
    specification = registry.get(operation).specification

    @functools.wraps(specification)
    def function(*arguments: Any) -> Any:
        if not any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in arguments):
            raise RuntimeError("not implemented for this device\nand a long explanation")
        return specification(*arguments)

    monkeypatch.setattr(registry.get(operation), "specification", function)
    monkeypatch.setattr(registry.get(operation), "twins", [])


@pytest.mark.parametrize("operation", ["rms_norm", "cache_write", "index_select", "moe_route", "linear", "mla_dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_twin", [False, True])
def test_an_operation_that_a_device_cannot_run_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch, operation: str, dtype: str, with_twin: bool
) -> None:
    """The pass goes on with the fp64 result, so that everything else is still measured."""
    unsupported(operation, monkeypatch)
    if with_twin:
        with broken(operation, raising_dense):
            report = diagnose(directory, dtype=dtype, lengths=LENGTHS)
    else:
        report = diagnose(directory, dtype=dtype, lengths=LENGTHS)
    assert not report.ok
    assert report.failed == (operation,)
    failed = {(line.twin, line.note) for line in report.lines if not line.ok}
    expected = {("torch", "RuntimeError: not implemented for this device")}
    assert failed == expected | ({("broken", "RuntimeError: the launch failed")} if with_twin else set())
    assert {"attention layer", "logits", "moe_experts", "mla_sparse"} <= {line.operation for line in report.lines}
    assert "FAIL" in text(report) and "implemented" in text(report)


def test_the_command_names_what_a_device_cannot_run(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unsupported("rms_norm", monkeypatch)
    assert cli.run(("doctor", str(directory), "--device", "cpu")) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_pass_that_breaks_off_is_a_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error outside every operation."""

    def fail(*_: Any) -> None:
        raise NotImplementedError("no embedding here\nand more")

    monkeypatch.setattr(GlmForCausalLM, "forward", fail)
    report = diagnose(directory, lengths=LENGTHS)
    assert report.failed == ("forward pass",)
    assert {line.note for line in report.lines} == {"NotImplementedError: no embedding here"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(directory: Path, tmp_path: Path, value: float) -> None:
    model = GlmForCausalLM(tiny())
    model.init_weights(0)
    name = "model.layers.3.mlp.experts.down_proj"
    model.get_parameter(name).data[1, 2, 3] = value
    save_model(model, tmp_path)
    report = diagnose(tmp_path)
    assert not report.ok
    assert report.bad_weights == (name,)
    assert name in text(report).replace("\n", "")
    with pytest.raises(UnhealthyError, match=name):
        require_healthy(tmp_path)


def test_serving_is_refused(directory: Path) -> None:
    assert require_healthy(directory).ok
    with broken("mla_sparse", wrong_sparse), pytest.raises(UnhealthyError, match=r"mla_sparse.*doctor"):
        require_healthy(directory)


def test_the_command_says_so_with_its_exit_code(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("doctor", str(directory), "--device", "cpu", "--json")
    assert cli.run(command) == 0
    assert msgspec.json.decode(capsys.readouterr().out)["ok"] is True
    with broken("rope", wrong_rope):
        assert cli.run(command) == 1
    lines = msgspec.json.decode(capsys.readouterr().out)["lines"]
    assert {line["operation"] for line in lines if not line["ok"]} == {"rope"}


def test_the_command_takes_a_precision(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(("doctor", str(directory), "--device", "cpu", "--dtype", "float32", "--json")) == 0
    assert msgspec.json.decode(capsys.readouterr().out)["dtype"] == "float32"


@pytest.mark.parametrize("lengths", [(1,), (8, 2**21)])
def test_lengths_are_checked(directory: Path, lengths: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="lengths"):
        diagnose(directory, lengths=lengths)
