"""Optimizers and the learning-rate schedule.

Hidden matrices train with Muon; embedding, head, norms and biases with AdamW (GLM-5 report). So does the router here:
its rows are classifiers of experts, as the head's are of tokens. `torch.optim.Muon` takes single matrices; a parameter
that holds several (stacked experts, heads under Muon Split) goes to `StackedMuon`, which does to each of them what
`torch.optim.Muon` would, in one batched Newton-Schulz iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from indexshare.model.config import GlmConfig
from indexshare.train.muon import MOMENTUM, NUM_NEWTON_SCHULZ_STEPS, StackedMuon
from indexshare.train.sharded_muon import ShardedMuon

ADAMW_BETAS = (0.9, 0.95)

_ADAMW_MATRICES = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")


def learning_rate_ratio(step: int, *, num_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Learning rate at `step` (from 0) over its peak: linear warm-up, then a cosine to `min_ratio` at the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def row_blocks(name: str, config: GlmConfig, *, muon_split: bool) -> tuple[int, ...] | None:
    """Rows of the matrices that parameter `name` holds; None when it is a single matrix.

    Muon Split (GLM-5 report): orthogonalise the up-projections of queries, keys and values per head.
    """
    if name.endswith("experts.gate_up_proj"):
        return (config.moe_intermediate_size,)
    if name.endswith("experts.down_proj"):
        return (config.hidden_size,)
    if muon_split and name.endswith("q_b_proj.weight"):
        return (config.qk_nope_head_dim + config.qk_rope_head_dim,)
    if muon_split and name.endswith("kv_b_proj.weight"):
        return (config.qk_nope_head_dim, config.v_head_dim)
    return None


def is_muon(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains this parameter, rather than AdamW."""
    return parameter.ndim >= 2 and not name.endswith(_ADAMW_MATRICES)


def build_optimizers(
    model: nn.Module,
    config: GlmConfig,
    *,
    learning_rate_muon: float,
    learning_rate_adamw: float,
    weight_decay: float,
    muon_split: bool = False,
    muon_dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.optim.Optimizer, ...]:
    """Optimizers over all parameters of `model` that require a gradient: Muon, StackedMuon and AdamW, those not empty.

    muon_dtype: of Newton-Schulz; torch's Muon knows BF16 only, and no shards, and stands back otherwise.

    Each group carries `param_names` (torch's) and `peak_lr`, its learning rate at a schedule ratio of 1.
    Vectors (norms, biases) are not decayed.
    """
    single: list[tuple[str, nn.Parameter]] = []
    stacked: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
    tables: list[tuple[str, nn.Parameter]] = []
    vectors: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        blocks = row_blocks(name, config, muon_split=muon_split)
        if blocks is not None:
            stacked.setdefault(blocks, []).append((name, parameter))
        elif parameter.ndim < 2:
            vectors.append((name, parameter))
        elif name.endswith(_ADAMW_MATRICES):
            tables.append((name, parameter))
        else:
            single.append((name, parameter))

    optimizers: list[torch.optim.Optimizer] = []
    is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if single and muon_dtype == torch.bfloat16 and not is_sharded:
        optimizers.append(
            torch.optim.Muon(
                single,  # type: ignore[arg-type]  # torch accepts (name, parameter) pairs; its stub lags
                lr=learning_rate_muon,
                weight_decay=weight_decay,
                momentum=MOMENTUM,
                ns_steps=NUM_NEWTON_SCHULZ_STEPS,
                adjust_lr_fn="match_rms_adamw",
            )
        )
        single = []
    groups: list[dict[str, Any]] = [
        {"params": parameters, "row_blocks": blocks}
        for blocks, parameters in (*stacked.items(), (None, single))
        if parameters
    ]
    if groups:
        kind = ShardedMuon if is_sharded else StackedMuon
        optimizers.append(kind(groups, lr=learning_rate_muon, weight_decay=weight_decay, dtype=muon_dtype))
    adamw_groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((tables, weight_decay), (vectors, 0.0))
        if parameters
    ]
    if adamw_groups:
        # fused: one pass over memory on CPU and GPU alike
        optimizers.append(torch.optim.AdamW(adamw_groups, lr=learning_rate_adamw, betas=ADAMW_BETAS, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return tuple(optimizers)


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], ratio: float) -> None:
    """Set each group's learning rate to `ratio` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * ratio


def named_state(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor]]]:
    """(name, parameter, its optimizer state, empty before a step) for every parameter of every optimizer."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield name, parameter, optimizer.state[parameter]


@torch.no_grad()
def update_router_biases(model: nn.Module, expert_counts: Mapping[int, Tensor], rate: float) -> None:
    """Balance experts without an auxiliary loss (DeepSeek-V3 sec. 2.1.2): raise the bias of experts with little work.

    `expert_counts`: by layer, [E] tokens routed to each expert; a layer that did not run is left out.
    """
    held = dict(model.named_parameters())
    for layer, counts in expert_counts.items():
        bias = held.get(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
        if bias is None:  # a router that is balanced by a loss alone, or one of another stage
            continue
        load = counts.to(bias)
        bias.add_(torch.sign(load.mean() - load), alpha=rate)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of `model`, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
