"""How far the result of an operation on a device is from fp64 on the CPU: for numbers, and for choices among near ties.

A comparison takes the call, its arguments made `wide` before it ran, and its wide result; it gives an error and a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from indexshare.kernels import registry
from indexshare.kernels.formats import QuantizedWeight
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.packed import PackedWeight

QUERY_TILE = 64


def wide(value: Any) -> Any:
    """An argument of an operation on the CPU, floating tensors as fp64 copies."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.to("cpu", torch.float64, copy=True) if value.is_floating_point() else value.cpu()
    if isinstance(value, PackedWeight):
        return wide(value.plain())
    if isinstance(value, QuantizedWeight):
        return value.to("cpu")
    if isinstance(value, KeyLayout):
        return replace(value, page_table=None if value.page_table is None else value.page_table.cpu())
    if isinstance(value, (list, tuple)):
        return type(value)(wide(item) for item in value)
    return value


def narrow(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A result of `wide` arguments on a device, floating tensors in its precision."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(narrow(item, dtype, device) for item in value)
    return value


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the reference; infinite for another shape."""
    if result.shape != expected.shape:
        return math.inf
    difference = float((result - expected).square().mean().sqrt())
    return difference / max(float(expected.square().mean().sqrt()), 1e-300) if difference else 0.0


def compare_result(call: registry.Call, inputs: list[Any], result: Any) -> tuple[float, str]:
    """Against the specification in fp64; of several results the worst."""
    expected = call.operation.specification(*inputs)
    if isinstance(expected, Tensor):
        return relative_error(result, expected), ""
    return max(relative_error(*pair) for pair in zip(result, expected, strict=True)), ""


def _compare_pool(call: registry.Call, inputs: list[Any], result: None) -> tuple[float, str]:
    """cache_write: the whole pool afterwards, so that rows which should have stayed are compared as well."""
    call.operation.specification(*inputs)
    return relative_error(wide(call.args[0]), inputs[0]), ""


def _shortfall(scores: Tensor, chosen: Tensor, allowed: Tensor) -> Tensor:
    """By how much the worst chosen score of each row is below the best one left out, at least 0."""
    worst = scores.masked_fill(~chosen, math.inf).amin(-1)
    best_left = scores.masked_fill(chosen | ~allowed, -math.inf).amax(-1)
    return (best_left - worst).clamp(min=0)


def _compare_selection(call: registry.Call, inputs: list[Any], result: Tensor) -> tuple[float, str]:
    """index_select: a valid set for every query, as good as the exact one up to near ties."""
    query, weights, pool, layout, topk = inputs
    error, num_same, num_exact = 0.0, 0, 0
    for b in range(layout.num_sequences):
        rows = layout.rows(b)
        keys = pool[rows]
        position_of_row = torch.full((pool.shape[0],), -1).index_put_((rows,), torch.arange(len(rows)))
        for begin in range(layout.sequence_starts[b], layout.sequence_starts[b + 1], QUERY_TILE):
            tile = slice(begin, min(begin + QUERY_TILE, layout.sequence_starts[b + 1]))
            products = torch.einsum("tji,si->tjs", query[tile], keys).relu_() * query.shape[-1] ** -0.5
            scores = torch.einsum("tj,tjs->ts", weights[tile], products)
            last_seen = torch.arange(tile.start, tile.stop) - layout.sequence_starts[b] + layout.num_past(b)
            visible = torch.arange(len(rows)) <= last_seen[:, None]
            selected = result[tile].long()
            if selected.max() >= pool.shape[0]:
                return math.inf, "rows outside the pool"
            positions = position_of_row[selected.clamp(min=0)].masked_fill(selected < 0, len(rows))
            if bool((positions < 0).any() | (positions.diff(dim=-1) < 0).any()):
                return math.inf, "rows of another sequence, or not in order"
            chosen = torch.zeros(len(scores), len(rows) + 1, dtype=torch.bool).scatter_(1, positions, True)[:, :-1]
            counts = (last_seen + 1).clamp(max=topk)
            if bool((chosen & ~visible).any()) or not torch.equal(chosen.sum(-1), counts):
                return math.inf, "future keys, or too few"
            spread = scores.masked_fill(~visible, 0.0).square().sum(-1).div(last_seen + 1).sqrt().clamp_min(1e-300)
            error = max(error, float((_shortfall(scores, chosen, visible) / spread).max()))
            hidden = scores.masked_fill(~visible, -math.inf)
            exact = hidden.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
            num_same += int((chosen & visible).gather(1, exact).sum())
            num_exact += int(counts.sum())
    return error, f"{num_same / num_exact:.3%} of the exact choice"


def _compare_routing(call: registry.Call, inputs: list[Any], result: tuple[Tensor, Tensor]) -> tuple[float, str]:
    """moe_route: different experts as good as the best up to near ties, and the gates of those experts."""
    hidden, weight, bias, num_chosen, normalise, scale = inputs
    experts, gates = result
    scores = (hidden @ weight.T).sigmoid()
    if experts.shape != (len(hidden), num_chosen) or not bool(((experts >= 0) & (experts < len(weight))).all()):
        return math.inf, "not a choice of experts"
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, experts, True)
    if not bool((chosen.sum(-1) == num_chosen).all()):
        return math.inf, "an expert was chosen twice"
    expected = scores.gather(1, experts)
    if normalise:
        expected = expected / (expected.sum(-1, keepdim=True) + 1e-20)
    shortfall = float(_shortfall(scores + bias, chosen, torch.ones_like(chosen)).max()) if num_chosen < len(bias) else 0
    return max(shortfall, relative_error(gates, expected * scale)), ""


# Operations whose result is compared otherwise than by `compare_result`.
COMPARISONS: dict[str, Callable[..., tuple[float, str]]] = {
    "cache_write": _compare_pool,
    "index_select": _compare_selection,
    "moe_route": _compare_routing,
}
