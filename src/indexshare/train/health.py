"""When a step counts as bad, and which steps a run leaves out when it goes back to a checkpoint because of it.

Rolling back and leaving out the batches around a spike is what PaLM did (arXiv 2204.02311, section 5.1): the same data
at other weights is harmless.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import nn

from indexshare.train.distributed import agree, local
from indexshare.train.optim import named_tensors

# A spike: in two of the last three steps the loss is so many nats above the median of the steps before them, and above
# the highest of them. One odd batch is no divergence; and where rows of two kinds alternate, the median says little.
ABOVE_MEDIAN = 0.75
ABOVE_HIGHEST = 0.25
SPIKE_WINDOW = 64
SPIKE_MIN_STEPS = 16
MAX_ROLLBACKS = 3  # without a good step and its checkpoint in between; then batches are not what is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A step that must not stand. `steps` (from 0) take no update when the run comes to them again."""

    reason: str
    steps: range


def find_spike(losses: list[float], step: int) -> Fault | None:
    """The fault when the newest of `losses`, that of `step` (from 0), completes a spike.

    Left out is everything from the step before the first high loss, whose update may have caused it, to this one.
    """
    if not is_spike(losses):
        return None
    usual = losses[:-3]
    first_high = next(place for place, loss in enumerate(losses[-3:]) if loss > spike_limit(usual))
    reason = f"the loss jumped to {losses[-1]:.3f}, its median was {statistics.median(usual):.3f}"
    return Fault(reason=reason, steps=range(step - 3 + first_high, step + 1))


def is_spike(losses: list[float]) -> bool:
    """Whether two of the last three losses are above what the ones before them allow."""
    limit = spike_limit(losses[:-3])
    return sum(loss > limit for loss in losses[-3:]) >= 2


def spike_limit(usual: list[float]) -> float:
    """What a loss may reach after these, in nats; infinite while there are too few to judge by."""
    if len(usual) < SPIKE_MIN_STEPS:
        return math.inf
    return max(statistics.median(usual) + ABOVE_MEDIAN, max(usual) + ABOVE_HIGHEST)


def find_non_finite(model: nn.Module) -> str:
    """Where the model has a NaN or an infinity: the first such tensor, "" when there is none. On several ranks all of
    them call this; none answers "" when one has found something in its shards."""
    held = {name: local(tensor.detach()) for name, tensor in named_tensors(model)}
    held = {name: tensor for name, tensor in held.items() if tensor.is_floating_point() and tensor.numel()}
    extremes = [torch.stack(tensor.aminmax()).float() for tensor in held.values()]
    is_finite = torch.stack(extremes).isfinite().all(dim=1).tolist() if extremes else []
    found = next((name for name, finite in zip(held, is_finite, strict=True) if not finite), "")
    is_somewhere = agree((False, True), bool(found))
    return found or ("the part of another process" if is_somewhere else "")
