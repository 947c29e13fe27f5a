"""Muon for parameters in shards: each matrix is orthogonalised whole, by one rank, and no rank does it twice.

Momentum and weights stay in their shards. The updates of as many parameters as there are ranks go round together: one
all-to-all gives each rank one whole update, a second takes the results home, both in the precision of the iteration. So
the arithmetic is that of one process (distributed Muon: Moonlight, arXiv 2502.16982, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Shard

from indexshare.train.distributed import local
from indexshare.train.muon import MOMENTUM, UPDATE_RMS, orthogonalize


class ShardedMuon(torch.optim.Optimizer):
    """`StackedMuon` over DTensors whose rows (last axis but one) are sharded along the first dimension of their mesh.

    Each parameter group names `row_blocks` as there; None is one matrix. Over further mesh dimensions, matrices may be
    divided as wholes (experts).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype  # of the Newton-Schulz iteration, and on the way

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure has no use here
        """Update every parameter that has a gradient; all ranks together."""
        waiting: dict[distributed.ProcessGroup, list[tuple[nn.Parameter, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    waiting.setdefault(parameter.device_mesh.get_group(0), []).append((parameter, group))
        for ranks, entries in waiting.items():
            # of one size in one round, as far as possible: the slowest rank is waited for
            entries.sort(key=lambda entry: -entry[0].numel())
            for first in range(0, len(entries), ranks.size()):
                self._update(entries[first : first + ranks.size()], ranks)

    def _update(self, entries: list[tuple[nn.Parameter, dict[str, Any]]], ranks: distributed.ProcessGroup) -> None:
        """Parameter i of `entries` is orthogonalised by rank i."""
        updates = [self._momentum_update(parameter) for parameter, _ in entries]
        heights = [_heights(parameter, ranks.size()) for parameter, _ in entries]
        mine = heights[ranks.rank()] if ranks.rank() < len(entries) else []
        lead, width = (updates[ranks.rank()].shape[:-2], updates[ranks.rank()].shape[-1]) if mine else ((), 0)
        home_sizes = [update.numel() for update in updates] + [0] * (ranks.size() - len(updates))
        my_sizes = [math.prod(lead) * rows * width for rows in mine] or [0] * ranks.size()
        flat = _exchange(torch.cat([update.flatten() for update in updates]), my_sizes, home_sizes, ranks)
        if mine:
            pieces = [part.view(*lead, rows, width) for part, rows in zip(flat.split(my_sizes), mine, strict=True)]
            done = _orthogonalize(torch.cat(pieces, dim=-2), entries[ranks.rank()][1]["row_blocks"], self.dtype)
            flat = torch.cat([part.flatten() for part in done.split(mine, dim=-2)])
        results = _exchange(flat, home_sizes, my_sizes, ranks).split(home_sizes)
        for (parameter, group), update, rows, result in zip(entries, updates, heights, results, strict=False):
            scales = _row_scales(parameter, group["row_blocks"])
            scales = scales.split(rows)[ranks.rank()].to(update.device)
            target = local(parameter)
            target.mul_(1 - group["lr"] * group["weight_decay"])
            target.add_(result.view_as(update) * scales[:, None], alpha=-group["lr"])

    def _momentum_update(self, parameter: nn.Parameter) -> Tensor:
        """This rank's shard of what is to be orthogonalised."""
        assert isinstance(parameter.grad, DTensor)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient = parameter.grad.to_local()
        momentum = state["momentum_buffer"].to_local().lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM).to(self.dtype)


def _heights(parameter: nn.Parameter, num_ranks: int) -> list[int]:
    """Rows of the shard of each rank, as DTensor divides them."""
    assert isinstance(parameter, DTensor)
    placement = parameter.placements[0]
    assert isinstance(placement, Shard) and placement.dim == parameter.ndim - 2, "matrices are sharded by rows"
    rows = parameter.shape[-2]
    share = -(-rows // num_ranks)
    return [max(0, min(share, rows - share * rank)) for rank in range(num_ranks)]


def _exchange(flat: Tensor, receive: Sequence[int], send: Sequence[int], ranks: distributed.ProcessGroup) -> Tensor:
    """Parts of `flat`, `send` numbers for each rank in turn -> what they sent, `receive` numbers from each."""
    result = flat.new_empty(sum(receive))
    distributed.all_to_all_single(result, flat, list(receive), list(send), group=ranks)
    return result


def _orthogonalize(update: Tensor, row_blocks: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    """Each matrix of a whole parameter on its own; same shape."""
    blocks = row_blocks or (update.shape[-2],)
    parts = update.reshape(-1, sum(blocks), update.shape[-1]).split(blocks, dim=1)
    return torch.cat([orthogonalize(part, dtype) for part in parts], dim=1).view(update.shape)


def _row_scales(parameter: Tensor, row_blocks: tuple[int, ...] | None) -> Tensor:
    """fp32 [rows]: the factor that makes the root mean square of each matrix's update UPDATE_RMS."""
    rows, columns = parameter.shape[-2:]
    blocks = row_blocks or (rows,)
    scales = torch.cat([torch.full((block,), UPDATE_RMS * math.sqrt(max(block, columns))) for block in blocks])
    return scales.repeat(rows // sum(blocks))
