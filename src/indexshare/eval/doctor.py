"""The numeric gate: every operation of a given model on a given device against fp64 on the CPU.

A forward pass runs on the device, below and above `index_topk`, as prefill and as one decode step. Each call of an
operation is repeated by its specification in fp64 from the *same* inputs, so that an error is that operation's own and
not what earlier ones handed on; a call that fails is replaced by the specification, or where the device cannot run that
by the fp64 result, before the pass goes on. Whole attention layers and the output head are compared too. The reference
is built for one operation or layer at a time.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor, nn

from indexshare import runtime
from indexshare.engine.cache import PagedCache, num_pages_for
from indexshare.errors import KernelError, RequestError
from indexshare.eval.comparison import COMPARISONS, compare_result, narrow, relative_error, wide
from indexshare.kernels import ops, registry
from indexshare.kernels.formats import QuantizedWeight
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.packed import PackedWeight
from indexshare.model.batch import CacheView, ForwardBatch, Selection
from indexshare.model.config import GlmConfig
from indexshare.model.glm import Attention, GlmForCausalLM, RopeTable, assign_weights, weights_of
from indexshare.model.native import pack_model
from indexshare.model.weights import Quant, load_model

# Relative root mean square error that one operation and one whole layer may have. A rounding to bfloat16 alone is 2e-3,
# and the experts round a few times. Choices are made in fp32 whatever the weights are.
OPERATION_TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
CHOICE_TOLERANCES = {"index_select": 1e-4, "moe_route": 1e-4}
LAYER_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# With int8 and int4 weights activations are rounded to 255 levels. Where they are results of the operation or layer
# itself, a few of them fall to the other side of a border than in fp64: a step of one level, not an error.
LEVEL_TOLERANCE = 1e-2
PAGE_SIZE = 64
HEAD_ROWS = 16  # rows of the output head that are compared
DEVICE_ERRORS = (RuntimeError, TypeError, KernelError)  # what torch and we raise where a device cannot do something


class UnhealthyError(KernelError):
    """A model whose weights or operations the doctor rejects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The worst of `calls` calls of one operation (or layer) at one length.

    error: relative root mean square error; for a choice (index_select, moe_route) how far the worst chosen one falls
    short of the best that was left out, relative to the scores. place: where the worst call was.
    """

    operation: str
    twin: str
    length: int
    calls: int
    error: float
    tolerance: float
    place: str
    note: str
    ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """What `diagnose` found. bad_weights: tensors that hold NaN or infinity; then nothing was run.

    not_run: operations that no pass called; those of training are always among them.
    """

    model: str
    device: str
    dtype: str
    lengths: tuple[int, ...]
    bad_weights: tuple[str, ...]
    lines: tuple[Line, ...]
    not_run: tuple[str, ...]
    ok: bool

    @property
    def failed(self) -> tuple[str, ...]:
        """Operations with a line that failed, each once."""
        return tuple(dict.fromkeys(line.operation for line in self.lines if not line.ok))


def diagnose(
    directory: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    lengths: tuple[int, ...] | None = None,
    index_pattern: str | None = None,
    quant: Quant | None = None,
    strict: bool = True,
) -> DoctorReport:
    """Check a model directory on a device.

    lengths: tokens of each pass, 2 or more; by default one below and one above `index_topk`. Tokens are random and
    always the same. index_pattern, quant, strict: as in `load_model`. Raises what `load_model` raises, ConfigError for
    a device or dtype, RequestError for lengths.
    """
    target, number_type = runtime.resolve_device(device), runtime.resolve_dtype(dtype)
    model = load_model(
        directory, dtype=number_type, device=target, index_pattern=index_pattern, quant=quant, strict=strict
    )
    if target.type == "cpu":
        pack_model(model)  # what runs is what is checked
    config = model.requires_grad_(False).eval().config
    chosen = lengths or (max(2, min(config.index_topk // 2, 1024)), config.index_topk + 256)
    if min(chosen) < 2 or max(chosen) > config.max_position_embeddings:
        raise RequestError(f"lengths must be from 2 to {config.max_position_embeddings:,}, not {chosen}")
    bad_weights = tuple(name for name, weight in weights_of(model).items() if not _is_finite(weight))
    gate = _Gate(config, number_type, target)
    with torch.inference_mode(), _observed(model, gate):
        for length in chosen if not bad_weights else ():
            gate.length = length
            try:
                _walk(model, length)
            except DEVICE_ERRORS as error:
                gate.record("forward pass", registry.SPECIFICATION, math.inf, 0.0, _described(error))
    lines = tuple(gate.lines.values())
    ran = {line.operation for line in lines}
    return DoctorReport(
        model=os.fspath(directory),
        device=str(target),
        dtype=str(number_type).removeprefix("torch."),
        lengths=chosen,
        bad_weights=bad_weights,
        lines=lines,
        not_run=tuple(name for name in registry.names() if name not in ran),
        ok=not bad_weights and all(line.ok for line in lines),
    )


def require_healthy(
    directory: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    index_pattern: str | None = None,
    quant: Quant | None = None,
    strict: bool = True,
) -> DoctorReport:
    """The report of `diagnose`, for whoever must not serve a broken model.

    Raises UnhealthyError for weights that are not finite and for operations that fail, with their names.
    """
    report = diagnose(directory, device=device, dtype=dtype, index_pattern=index_pattern, quant=quant, strict=strict)
    if report.bad_weights:
        raise UnhealthyError(f"weights that are not finite numbers: {', '.join(report.bad_weights)}")
    if not report.ok:
        raise UnhealthyError(
            f"wrong results on {report.device} in {report.dtype}: {', '.join(report.failed)}; "
            "`indexshare doctor` has the details"
        )
    return report


def render(report: DoctorReport) -> Group:
    """A table of operation x length x error x tolerance x verdict, and a sentence."""
    names = ("operation", "length", "error", "allowed", "verdict")
    table = Table(*(Column(name, no_wrap=True) for name in names), "worst at")
    for line in report.lines:
        verdict = "[green]ok[/]" if line.ok else "[bold red]FAIL[/]"
        name = line.operation if line.twin == registry.SPECIFICATION else f"{line.operation} ({line.twin})"
        where = f"{line.place}: {escape(line.note)}" if line.note else line.place
        table.add_row(name, f"{line.length:,}", f"{line.error:.1e}", f"{line.tolerance:.0e}", verdict, where)
    notes = [f"not finite: {name}" for name in report.bad_weights]
    if report.lines and report.not_run:
        notes.append(f"did not run: {', '.join(report.not_run)}")
    what = f"{report.model} on {report.device} in {report.dtype}"
    verdict = f"{what}: every operation of inference that ran is right" if report.ok else f"{what}: do not use it"
    return Group(*([table] if report.lines else []), *notes, verdict)


def _is_finite(weight: ops.Weight) -> bool:
    weight = weight.plain() if isinstance(weight, PackedWeight) else weight
    if isinstance(weight, QuantizedWeight):
        if weight.format == "fp8" and bool((weight.data.view(torch.uint8) & 127 == 127).any()):
            return False  # the one NaN of E4M3; it has no infinity
        weight = weight.scales
    return bool(weight.isfinite().all())


def _rounds_activations(weights: Iterable[Any]) -> bool:
    formats = (
        weight.dtype if isinstance(weight, PackedWeight) else getattr(weight, "format", "") for weight in weights
    )
    return any(name in ("int8", "int4") for name in formats)


def _described(error: BaseException) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]


class _Gate:
    """Compares calls and keeps the worst of each kind."""

    def __init__(self, config: GlmConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.length = 0
        self.place = ""
        self.lines: dict[tuple[str, str, int], Line] = {}

    def record(self, operation: str, twin: str, error: float, tolerance: float, note: str = "") -> bool:
        """Adds one comparison; whether it passes. An error that is not a number fails."""
        passed = error <= tolerance
        error = math.inf if math.isnan(error) else error
        key = (operation, twin, self.length)
        line = self.lines.get(key)
        calls = 1 + (line.calls if line else 0)
        if line is None or error > line.error:
            line = Line(
                operation=operation,
                twin=twin,
                length=self.length,
                calls=calls,
                error=error,
                tolerance=tolerance,
                place=self.place,
                note=note,
                ok=passed,
            )
        self.lines[key] = replace(line, calls=calls, ok=line.ok and passed)
        return passed

    def check(self, call: registry.Call) -> Any:
        """Runs a call and compares it; gives the specification's result when it fails, in fp64 when that fails too."""
        name = call.operation.name
        bound = inspect.signature(call.operation.specification).bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        inputs = [wide(value) for value in bound.args]  # before the call, which may write into its arguments
        pool = call.args[0] if name == "cache_write" else None
        before = None if pool is None else pool.clone()
        is_twin = call.twin != registry.SPECIFICATION
        result, has_run = None, False
        try:
            result = call.run()
            error, note = COMPARISONS.get(name, compare_result)(call, inputs, wide(result))
            has_run = True
        except DEVICE_ERRORS as failure:
            error, note = math.inf, _described(failure)
        tolerance = CHOICE_TOLERANCES.get(name, OPERATION_TOLERANCES[self.dtype])
        if name == "moe_experts" and _rounds_activations(inputs):
            tolerance = max(tolerance, LEVEL_TOLERANCE)
        passed = self.record(name, call.twin, error, tolerance, note)
        if passed or (has_run and not is_twin):
            return result
        if pool is not None and before is not None:
            pool.copy_(before)
        if is_twin:
            try:
                return call.run_specification()
            except DEVICE_ERRORS as failure:
                self.record(name, registry.SPECIFICATION, math.inf, tolerance, _described(failure))
        result = call.operation.specification(*inputs)
        if pool is not None:
            pool.copy_(inputs[0])
        return narrow(result, self.dtype, self.device)

    def record_layer(self, name: str, error: float, weights: Iterable[Any]) -> None:
        """Adds a comparison of more than one operation."""
        tolerance = LAYER_TOLERANCES[self.dtype]
        if _rounds_activations(weights):
            tolerance = max(tolerance, LEVEL_TOLERANCE)
        self.record(name, registry.SPECIFICATION, error, tolerance)

    def check_attention(self, module: nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, Selection]) -> None:
        """Forward hook: a whole attention layer in fp64, attending to what the device selected."""
        assert isinstance(module, Attention)
        x_TD, _, batch, _ = arguments
        if batch.layout.num_past(0) > 0:
            return  # the cache of the reference would have to be filled first
        with torch.device("meta"):
            attention = Attention(self.config, module.layer)
        attention.indexer = None  # a shared layer: near ties may be chosen differently in fp64
        weights = {name: wide(weight) for name, weight in weights_of(module).items() if "indexer" not in name}
        assign_weights(attention, weights)
        x_TD, positions, pool = wide(x_TD), batch.positions.cpu(), wide(batch.cache.latents[module.layer])
        wide_batch = ForwardBatch(
            token_ids=batch.token_ids.cpu(),
            positions=positions,
            layout=wide(batch.layout),
            cache=CacheView(latents=(pool,) * (module.layer + 1), index_keys=()),
        )
        selected = Selection(wide(output[1].rows))
        with registry.watch(registry.Call.run_specification):
            expected, _ = attention(x_TD, selected, wide_batch, RopeTable(positions, self.config, torch.float64))
        self.record_layer("attention layer", relative_error(wide(output[0]), expected), weights.values())

    def check_head(self, model: GlmForCausalLM, before_norm: Tensor) -> None:
        """The last norm and the output matrix, for a few rows."""
        result = model.logits(model.model.norm(before_norm))
        hidden = wide(before_norm)
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        expected = ops.linear.specification(normed * wide(model.model.norm.weight), wide(model.lm_head.weight))
        self.record_layer("logits", relative_error(wide(result), expected), [model.lm_head.weight])


@contextmanager
def _observed(model: GlmForCausalLM, gate: _Gate) -> Generator[None]:
    """Lets the gate see every operation, the attention layers, and which layer runs."""

    def enter(place: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            gate.place = place

        return hook

    def leave(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if not busy:
            busy.append(True)
            gate.check_head(model, arguments[0][-HEAD_ROWS:])
            busy.clear()

    busy: list[bool] = []
    handles = [model.model.norm.register_forward_pre_hook(enter("output"))]
    handles.append(model.model.norm.register_forward_hook(leave))
    for number, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(enter(f"layer {number}")))
        attention = layer.get_submodule("self_attn")
        handles.append(attention.register_forward_hook(gate.check_attention))
    try:
        with registry.watch(gate.check):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _walk(model: GlmForCausalLM, length: int) -> None:
    """Prefill of length - 1 tokens into pages in no order, the MTP layer over them, and one decode step."""
    embedding = model.model.embed_tokens.weight
    device, dtype = embedding.device, embedding.dtype
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (length,), generator=generator).to(device)
    num_pages = num_pages_for(length, PAGE_SIZE)
    cache = PagedCache(model.config, num_pages=num_pages, page_size=PAGE_SIZE, dtype=dtype, device=device)
    for pool in (*cache.view().latents, *cache.view().index_keys):
        if isinstance(pool, Tensor):
            pool.zero_()  # rows that nobody has written are compared too
    pages = torch.randperm(num_pages, generator=generator)[None].to(device)
    for begin, end in ((0, length - 1), (length - 1, length)):
        layout = KeyLayout(
            sequence_starts=(0, end - begin), context_lengths=(end,), page_table=pages, page_size=PAGE_SIZE
        )
        batch = ForwardBatch(
            token_ids=tokens[begin:end],
            positions=torch.arange(begin, end, device=device),
            layout=layout,
            cache=cache.view(),
        )
        hidden = model(batch)
        if begin == 0 and model.config.num_nextn_predict_layers:
            model.mtp(hidden, tokens[1:length], batch)
