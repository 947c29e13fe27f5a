"""Muon: momentum, made orthogonal (Jordan's Muon; GLM-5 report for its use here).

`torch.optim.Muon` takes single matrices; a parameter that holds several (stacked experts, heads under Muon Split) goes
to `StackedMuon`, which does to each of them what `torch.optim.Muon` would, in one batched Newton-Schulz iteration.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
NUM_NEWTON_SCHULZ_STEPS = 5
# The quintic of Jordan's Muon, the default of torch.optim.Muon: steepest at zero, so that five steps suffice.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Moonlight's scale: the root mean square of the update becomes 0.2, as AdamW's usually is; both can share a rate.
UPDATE_RMS = 0.2


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: singular values land in about [0.7, 1.2].

    `matrices` [n, M, N] any float dtype -> the same shape in `dtype`. BF16 is precise enough for training and several
    times faster where the processor knows it; but it turns differences in the last bit of a gradient into ones of a
    percent, so that runs with another order of sums drift apart. Five Newton-Schulz steps, batched over n.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrices.size(-2) > matrices.size(-1)
    result = matrices.to(dtype)
    if is_tall:
        result = result.mT
    result = result / result.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NUM_NEWTON_SCHULZ_STEPS):
        gram = result @ result.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.baddbmm(result, polynomial, result, beta=a)
    return result.mT if is_tall else result


class StackedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` for parameters that hold several matrices along their rows.

    Each parameter group names `row_blocks`, the row counts of consecutive matrices: a parameter [..., R, C] is read as
    [-1, C] rows, cut again and again into blocks of these sizes; None is one matrix.
    Experts [E, 2*I, D] with `row_blocks=(I,)` are 2*E
    matrices; `kv_b_proj` [H*(K+V), C] with `(K, V)` is one key and one value matrix for each head.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype  # of the Newton-Schulz iteration

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure has no use here
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        learning_rate, weight_decay = group["lr"], group["weight_decay"]
        row_blocks = group["row_blocks"] or (parameter.shape[-2],)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp(momentum, MOMENTUM)
        num_columns = parameter.size(-1)
        blocks = update.view(-1, sum(row_blocks), num_columns).split(row_blocks, dim=1)
        targets = parameter.view(-1, sum(row_blocks), num_columns).split(row_blocks, dim=1)
        parameter.mul_(1 - learning_rate * weight_decay)
        for target, block in zip(targets, blocks, strict=True):
            scale = UPDATE_RMS * math.sqrt(max(block.shape[-2:]))
            target.add_(orthogonalize(block, self.dtype), alpha=-learning_rate * scale)
