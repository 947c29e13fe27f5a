"""When a step counts as bad, and which steps a run leaves out when it goes back to a checkpoint because of it.

Rolling back and leaving out the batches around a spike is what PaLM did (arXiv 2204.02311, section 5.1): the same data
at other weights is harmless.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

# A spike: the total loss is above both bounds in two of the last three steps. One odd batch is no divergence.
SPIKE_FACTOR = 3.0
SPIKE_MARGIN = 1.0
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
    """Three times the median or one nat above it, whichever is more; infinite while there are too few to judge by."""
    if len(usual) < SPIKE_MIN_STEPS:
        return math.inf
    median = statistics.median(usual)
    return max(SPIKE_FACTOR * median, median + SPIKE_MARGIN)
