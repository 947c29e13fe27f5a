"""What registers each C++ operator beside its specification: which inputs it takes, and how it is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from indexshare.errors import KernelError
from indexshare.kernels import ops, registry
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.packed import LANES, PackedWeight
from indexshare.kernels.pool import Pool, QuantizedPool

FLOATS = "BF16 and fp32, without gradients"
PACKED = "packed weights, which `load` makes on a CPU"
_FLOATS = (torch.bfloat16, torch.float32)
MAX_PARTS = 16  # copies of the gradient of all latents


def _refusal(*tensors: Tensor) -> str | None:
    """What all twins need: BF16 or fp32 on a CPU, and no gradients."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device.type}"
        if tensor.dtype not in _FLOATS:
            return f"a tensor is {tensor.dtype}; the C++ kernels read bfloat16 and float32"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "gradients are wanted"
        if not tensor.is_contiguous():
            return "a tensor is not contiguous"
    return None


def _pool_refusal(pool: Pool) -> str | None:
    """The same for a pool, which may hold int8."""
    if not isinstance(pool, QuantizedPool):
        return _refusal(pool)
    if pool.device.type != "cpu" or not pool.data.is_contiguous():
        return f"a pool is on {pool.device}, or not contiguous"
    return None


def _bytes(pool: Pool) -> Tensor:
    return pool.data if isinstance(pool, QuantizedPool) else pool


def _index_select_twin(name: str, operators: Any) -> registry.Twin:
    no_pages = torch.empty(0, dtype=torch.int64)

    def supports(query: Tensor, weights: Tensor, keys: Pool, layout: KeyLayout, topk: int) -> str | None:
        if weights.dtype != torch.float32:
            return f"the head weights are {weights.dtype}, not float32"
        if isinstance(keys, QuantizedPool) and (keys.plain_dim or keys.group_size < keys.rounded_dim):
            return "a key must have one scale"
        return _refusal(query, weights) or _pool_refusal(keys)

    def index_select(query: Tensor, weights: Tensor, keys: Pool, layout: KeyLayout, topk: int) -> Tensor:
        ops.check_pool(keys)
        selection = torch.full((query.shape[0], min(topk, layout.max_context)), -1, dtype=torch.int32)
        for b, context in enumerate(layout.context_lengths):
            start, stop = layout.sequence_starts[b], layout.sequence_starts[b + 1]
            pages = no_pages if layout.page_table is None else layout.page_table[b].contiguous()
            found_nan = operators.index_select(
                query[start:stop],
                weights[start:stop],
                _bytes(keys),
                pages,
                layout.page_size,
                start,
                context,
                selection[start:stop],
            )
            if found_nan:
                raise KernelError(ops.NAN_SCORES)
        return selection

    return registry.Twin(name=name, devices=("cpu",), function=index_select, supports=supports, note=FLOATS)


def _mla_sparse_twin(name: str, operators: Any) -> registry.Twin:
    def supports(query: Tensor, latents: Pool, selection: Tensor, scale: float, latent_dim: int) -> str | None:
        if query.shape[-1] % 2 or latent_dim % LANES:
            return f"widths of {query.shape[-1]} and {latent_dim} are no multiples of 2 and of {LANES}"
        if isinstance(latents, QuantizedPool) and latents.rounded_dim != latent_dim:
            return f"{latents.rounded_dim} numbers of a row are rounded, not {latent_dim}"
        if not selection.is_contiguous():
            return "the selection is not contiguous"
        return _refusal(query) or _pool_refusal(latents)

    def mla_sparse(query: Tensor, latents: Pool, selection: Tensor, scale: float, latent_dim: int) -> Tensor:
        attended = query.new_empty(*query.shape[:2], latent_dim)
        group = latents.group_size if isinstance(latents, QuantizedPool) else 0
        operators.mla_sparse(query, _bytes(latents), group, selection, scale, attended)
        return attended

    return registry.Twin(name=name, devices=("cpu",), function=mla_sparse, supports=supports, note=FLOATS)


def _mla_sparse_backward_twin(name: str, operators: Any) -> registry.Twin:
    def supports(query: Tensor, latents: Tensor, selection: Tensor, gradient: Tensor, scale: float) -> str | None:
        if query.shape[-1] % LANES or gradient.shape[-1] % LANES:
            return f"widths of {query.shape[-1]} and {gradient.shape[-1]} are no multiples of {LANES}"
        if not selection.is_contiguous():
            return "the selection is not contiguous"
        return _refusal(query, latents)

    def mla_sparse_backward(
        query: Tensor, latents: Tensor, selection: Tensor, gradient: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        # each thread adds up on its own, in an order of its own: the sums are the same each time
        parts = torch.zeros(min(torch.get_num_threads(), MAX_PARTS), *latents.shape)
        slopes = torch.empty(query.shape)
        wide = [tensor.float().contiguous() for tensor in (query, latents, gradient)]
        operators.mla_sparse_backward(*wide[:2], selection, wide[2], scale, slopes, parts)
        return slopes.to(query.dtype), parts.sum(0).to(latents.dtype)

    return registry.Twin(name=name, devices=("cpu",), function=mla_sparse_backward, supports=supports)


def _linear_twin(name: str, operators: Any) -> registry.Twin:
    def supports(x: Tensor, weight: ops.Weight) -> str | None:
        if not isinstance(weight, PackedWeight):
            return "the weight is not packed"
        return _refusal(x.contiguous()) if x.shape[-1] == weight.shape[-1] else "the widths of x and weight differ"

    def linear(x: Tensor, weight: PackedWeight) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        output = x.new_empty(len(rows), weight.shape[0])
        operators.linear(rows, weight.descriptor, output)
        return output.view(*x.shape[:-1], -1)

    return registry.Twin(name=name, devices=("cpu",), function=linear, supports=supports, note=PACKED)


def _moe_experts_twin(name: str, operators: Any) -> registry.Twin:
    def supports(hidden: Tensor, experts: Tensor, gates: Tensor, gate_up: ops.Weight, down: ops.Weight) -> str | None:
        if not (isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)):
            return "the weights are not packed"
        if 2 * gate_up.matrix.num_outputs != gate_up.shape[1]:
            return "gate and up were packed as one piece"
        if gates.dtype != torch.float32 or experts.dtype != torch.int64 or not experts.is_contiguous():
            return "gates must be float32, experts int64 and contiguous"
        return _refusal(hidden, gates)

    def moe_experts(
        hidden: Tensor, experts: Tensor, gates: Tensor, gate_up: PackedWeight, down: PackedWeight
    ) -> Tensor:
        output = torch.empty_like(hidden)
        operators.moe_experts(hidden, experts, gates, gate_up.descriptor, down.descriptor, gate_up.shape[0], output)
        return output

    return registry.Twin(name=name, devices=("cpu",), function=moe_experts, supports=supports, note=PACKED)


def _rms_norm_twin(name: str, operators: Any) -> registry.Twin:
    def supports(x: Tensor, weight: Tensor, eps: float) -> str | None:
        return _refusal(x, weight) if x.shape[-1:] == weight.shape else "the widths of x and weight differ"

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        output = torch.empty_like(x)
        operators.rms_norm(x, weight, eps, output)
        return output

    return registry.Twin(name=name, devices=("cpu",), function=rms_norm, supports=supports, note=FLOATS)


def _rope_table_twin(name: str, operators: Any) -> registry.Twin:
    def supports(positions: Tensor, rope_dim: int, theta: float, dtype: torch.dtype = torch.float32) -> str | None:
        if positions.device.type != "cpu" or dtype != torch.float32 or not positions.is_contiguous():
            return f"positions on {positions.device}, a table of {dtype}"
        return None

    def rope_table(
        positions: Tensor, rope_dim: int, theta: float, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        table = torch.empty(2, len(positions), rope_dim // 2)
        operators.rope_table(positions, theta, table[0], table[1])
        return table[0], table[1]

    return registry.Twin(name=name, devices=("cpu",), function=rope_table, supports=supports)


TWINS = {
    "index_select": _index_select_twin,
    "linear": _linear_twin,
    "mla_sparse": _mla_sparse_twin,
    "mla_sparse_backward": _mla_sparse_backward_twin,
    "moe_experts": _moe_experts_twin,
    "rms_norm": _rms_norm_twin,
    "rope_table": _rope_table_twin,
}
