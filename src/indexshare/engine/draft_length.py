"""How many tokens to draft in the next step: the number that has given the most tokens per second so far.

What a draft is worth depends on how often it is right and on what a longer step costs, which changes with the number of
sequences. Both are in one figure that can be measured: tokens per second, by number of sequences (in powers of two)
and draft length. The best length is used, its neighbours are tried now and then, more seldom the longer it stays the
best, and 0 is a length like any other, so drafting ends where it does not pay. No torch here.
"""

from dataclasses import dataclass, field

SHORTEST_INTERVAL, LONGEST_INTERVAL = 16, 256  # steps between trials of another length
SMOOTHING = 0.1  # weight of a new measurement; more when the last one is older than a step


@dataclass(slots=True)
class _Load:
    """Measurements at one load: tokens per second by length, and in which step; steps so far, and until a trial."""

    rates: dict[int, float] = field(default_factory=dict)
    measured: dict[int, int] = field(default_factory=dict)
    steps: int = 0
    best: int = -1
    interval: int = SHORTEST_INTERVAL
    until_trial: int = SHORTEST_INTERVAL
    num_trials: int = 0


class DraftLength:
    """Chooses a length from 0 to `longest`; `is_fixed` always chooses `longest`."""

    def __init__(self, longest: int, *, is_fixed: bool = False) -> None:
        self.longest = longest
        self._is_fixed = is_fixed
        self._loads: dict[int, _Load] = {}

    def choose(self, num_sequences: int) -> int:
        """The length for a step with this many sequences that decode."""
        if self._is_fixed or self.longest == 0 or num_sequences == 0:
            return self.longest
        load = self._loads.setdefault(num_sequences.bit_length(), _Load())
        load.steps += 1
        untried = [length for length in self._first_trials() if length not in load.rates]
        if untried:
            return untried[0]
        best = max(load.rates, key=lambda length: load.rates[length])
        if best != load.best:
            load.best, load.interval, load.until_trial = best, SHORTEST_INTERVAL, SHORTEST_INTERVAL
        load.until_trial -= 1
        if load.until_trial > 0:
            return best
        load.interval = load.until_trial = min(2 * load.interval, LONGEST_INTERVAL)
        load.num_trials += 1
        neighbours = [length for length in (best - 1, best + 1, 0) if 0 <= length <= self.longest and length != best]
        return neighbours[load.num_trials % len(neighbours)]

    def observe(self, num_sequences: int, length: int, num_tokens: int, seconds: float) -> None:
        """A step that only decoded gave `num_tokens` tokens in `seconds`."""
        if num_sequences == 0 or seconds <= 0.0:
            return
        load = self._loads.setdefault(num_sequences.bit_length(), _Load())
        rate = num_tokens / seconds
        known = load.rates.get(length, rate)
        age = max(1, load.steps - load.measured.get(length, 0))
        load.rates[length] = known + (1.0 - (1.0 - SMOOTHING) ** age) * (rate - known)
        load.measured[length] = load.steps

    def _first_trials(self) -> list[int]:
        return sorted({0, (self.longest + 1) // 2, self.longest}, reverse=True)
