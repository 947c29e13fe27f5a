"""Which layers may share: the greedy search of IndexCache (arXiv 2603.12201, section 3), and a faster one.

Both begin with every indexer there is, and take one away at a time until enough are gone: always the one whose absence
costs the least loss on the calibration rows. `greedy` measures every candidate each time, as the paper does. `lazy`
does so once and keeps what it knows of each cost, a lower bound for a candidate that it left. From then on it holds
that what a layer's absence costs rarely becomes less while others are taken away, so that only the candidate with the
lowest known cost is measured again, until that stays the lowest (accelerated greedy, Minoux 1978). At the end it moves
indexers to layers nearby as long as the loss falls, which greedy cannot. Both use what layers before a change computed,
and leave a candidate as soon as it cannot win.

Moves, and the comparison with equal spacing, end within a quarter of the plain algorithm's work. What comes before them
takes less than that from about twelve layers on; a smaller model is searched all the same, and nothing is moved.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Literal

from indexshare.errors import ConfigError
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.share.calibration import (
    MEMORY_BYTES,
    CalibrationRow,
    PatternRunner,
    Run,
    fingerprint,
    own_pattern,
    weights_fingerprint,
)
from indexshare.share.state import Move, Removal, SearchState, load_state, save_state, write_json
from indexshare.train.pipeline import choose_stages

Method = Literal["greedy", "lazy"]
Progress = Callable[[int, int], None]

MAX_MOVE = 2  # layers by which `lazy` moves an indexer at once
MAX_WORK = 0.25  # of the plain search: there `lazy` moves no more indexers
STATE_FILE = "search.json"
STATE_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The pattern found, and what it costs. Losses are nats per supervised token of the calibration rows.

    uniform: the pattern of equal spacing with as many indexers, if the model has indexers there. work: layers x tokens
    of all forward passes, that over `uniform_pattern` among them, with the output matrix as head_layers layers, and
    without what a stopped search repeats. plain_work: what measuring every candidate with whole passes takes.
    """

    pattern: str
    num_full: int
    loss: float
    start_pattern: str
    start_loss: float
    uniform_pattern: str | None
    uniform_loss: float | None
    removals: tuple[Removal, ...]
    moves: tuple[Move, ...]
    method: Method
    num_blocks: int
    num_rows: int
    num_tokens: int
    num_runs: int
    head_layers: float
    work: float
    plain_work: float


def num_kept(keep: str, num_layers: int) -> int:
    """Indexers that "1/4" or "0.25" of a model's layers leaves, rounded up. Raises ConfigError."""
    try:
        share = Fraction(keep)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ConfigError(f"keep is the share of layers that keep an indexer, for example 1/4 or 0.25, not {keep!r}")
    return -(-num_layers * share.numerator // share.denominator)


def uniform_pattern(num_full: int, num_layers: int) -> str:
    """`num_full` full layers at equal distances, the first layer one of them."""
    full = {index * num_layers // num_full for index in range(num_full)}
    return "".join("F" if layer in full else "S" for layer in range(num_layers))


def plan_search(config: GlmConfig, pattern: str, keep: str, num_blocks: int) -> tuple[int, list[list[int]]]:
    """How many indexers stay, and the layers that may lose theirs, by block: all F but the first of each block.

    Raises ConfigError for a keep or blocks that leave nothing to search.
    """
    num_full, num_indexers = num_kept(keep, len(pattern)), pattern.count("F")
    if not 1 <= num_blocks <= num_indexers:
        raise ConfigError(f"blocks must be from 1 to {num_indexers}, the number of indexers, not {num_blocks}")
    if not num_blocks <= num_full < num_indexers:
        raise ConfigError(
            f"{keep} of {len(pattern)} layers are {num_full} indexers, and the model has {num_indexers}: "
            f"keep fewer than that, and at least one for each of the {num_blocks} blocks"
        )
    edges = (*choose_stages(config, num_blocks), len(pattern))
    return num_full, [
        [layer for layer in range(begin + 1, end) if pattern[layer] == "F"] for begin, end in pairwise(edges)
    ]


class PatternSearch:
    """A search that goes on where it was stopped, if `directory` has its state."""

    def __init__(
        self,
        model: GlmForCausalLM,
        rows: tuple[CalibrationRow, ...],
        *,
        keep: str,
        num_blocks: int = 1,
        method: Method = "lazy",
        directory: Path | None = None,
        memory_bytes: int = MEMORY_BYTES,
        progress: Progress | None = None,
    ) -> None:
        """keep: share of layers that keep their indexer. num_blocks: blocks of layers that are searched in turn, cut as
        `choose_stages` cuts a pipeline: each begins with an indexer, which stays. directory: for the state and the
        result. progress(done, total): rows that this call has measured and may have to, at most.

        Raises ConfigError for a keep or blocks that leave nothing to search, or a directory with another search.
        """
        self.runner = PatternRunner(model=model, rows=rows, memory_bytes=memory_bytes)
        self.method: Method = method
        self.directory = directory
        self.state_file = None if directory is None else directory / STATE_FILE
        self.progress = progress
        self.start = own_pattern(model)
        self.num_full, self.blocks = plan_search(model.config, self.start, keep, num_blocks)
        self.identity = {
            "version": STATE_VERSION,
            "model": None if directory is None else weights_fingerprint(model),
            "data": fingerprint(rows),
            "keep": self.num_full,
            "blocks": num_blocks,
            "method": method,
        }
        self.state = SearchState(pattern=self.start)
        self.base: Run | None = None  # the current pattern measured, with its boundaries
        self.has_uniform = all(
            self.start[layer] == "F"
            for layer, letter in enumerate(uniform_pattern(self.num_full, len(self.start)))
            if letter == "F"
        )
        self.done = self.total = 0  # rows, of this call

    def search(self) -> SearchResult:
        """Search to the end. Interrupted at any moment, it loses the candidate that was being measured, no more."""
        self._begin()
        state, num_tokens = self.state, self.runner.num_supervised
        while state.pattern.count("F") > self.num_full:
            winner = self._round()
            assert state.best is not None
            state.pattern, state.nats = _without(state.pattern, state.best), state.best_nats
            self.base = winner or self._again(state.pattern)
            loss = sum(state.nats) / num_tokens
            state.removals.append(Removal(layer=state.best, pattern=state.pattern, loss=loss))
            state.increases.pop(state.best, None)
            state.num_rounds += 1
            state.measured, state.floor, state.best, state.best_nats = [], list(state.nats), None, []
            self._save()
        if self.method == "lazy":
            self._refine()
        return self._result()

    def _begin(self) -> None:
        """Measure the pattern that the search stands at; with the state of another model or other data raise."""
        saved = None if self.state_file is None else load_state(self.state_file, self.identity)
        if saved is not None:
            self.state = saved
        state, work = self.state, self.runner.work
        self.total = len(self.runner.rows) + self._rows_left()
        self.base = self._pass(state.pattern)
        if saved is None:
            state.start_nats, state.nats, state.floor = (list(self.base.nats) for _ in range(3))
            self._save()
        else:
            work.layer_tokens, work.head_tokens, work.num_runs = state.layer_tokens, state.head_tokens, state.num_runs

    def _again(self, pattern: str) -> Run:
        """Measure what a search that was stopped has measured and counted before."""
        work = replace(self.runner.work)
        run = self._pass(pattern)
        self.runner.work = work
        return run

    def _pass(self, pattern: str) -> Run:
        *_, run = self._measured_rows(pattern)
        return run

    def _measured_rows(self, pattern: str) -> Iterator[Run]:
        """A run after each row, which counts as progress up to the total."""
        for run in self.runner.iterate(pattern, self.base):
            self.done = min(self.done + 1, self.total)
            self._report()
            yield run

    def _round(self) -> Run | None:
        """Find the layer of this round's block whose absence costs least; its run, unless a stopped search found it."""
        state, winner = self.state, None
        candidates = self._candidates()
        while waiting := [layer for layer in candidates if layer not in state.measured]:
            layer = min(waiting, key=lambda waits: (state.increases.get(waits, -inf), waits))
            if self.method == "lazy" and state.best is not None:
                best_increase = (sum(state.best_nats) - sum(state.nats)) / self.runner.num_supervised
                if best_increase <= state.increases.get(layer, -inf):
                    break
            run, at_least = self._measure(_without(state.pattern, layer))
            state.increases[layer] = (at_least - sum(state.nats)) / self.runner.num_supervised
            state.measured.append(layer)
            if run is not None:
                state.best, state.best_nats, winner = layer, list(run.nats), run
            self._save()
        return winner

    def _affords(self, first: int) -> bool:
        """Whether `lazy` may measure a pattern that differs from `first` on, and that of equal spacing in the end."""
        work = self.runner.total_work(self.runner.work) + self.runner.pass_work(first)
        return work + self.has_uniform * self.runner.pass_work(1) <= MAX_WORK * self._plain_work()

    def _refine(self) -> None:
        """Move indexers of the pattern found to layers nearby, as long as the loss falls and there is work left."""
        state = self.state
        state.floor = list(state.start_nats)  # a move may gain on any row, but hardly more than all indexers would
        while move := next((move for move in self._moves() if self._affords(min(move[:2]))), None):
            gone, new, pattern = move
            self.done = self.total
            self.total += len(self.runner.rows)
            state.best_nats = state.nats
            run, _ = self._measure(pattern)
            state.tried.append(pattern)
            if run is not None:
                state.pattern, state.nats, self.base = pattern, list(run.nats), run
                state.moves.append(Move(gone=gone, new=new, pattern=pattern, loss=self.runner.loss(run)))
            self._save()

    def _moves(self) -> Iterator[tuple[int, int, str]]:
        """Layers that lose and get an indexer, and the pattern then: what is near first, what costs little first."""
        state = self.state
        for distance in range(1, MAX_MOVE + 1):
            for block in self.blocks:
                movable = [layer for layer in block if state.pattern[layer] == "F"]
                for gone in sorted(movable, key=lambda layer: (state.increases.get(layer, 0.0), layer)):
                    for new in (gone - distance, gone + distance):
                        if new in block and state.pattern[new] == "S":
                            moved = _with(_without(state.pattern, gone), new)
                            if moved not in state.tried:
                                yield gone, new, moved

    def _candidates(self) -> list[int]:
        """Layers that may lose their indexer now; blocks take turns, and one with nothing left is passed over."""
        for turn in range(self.state.num_rounds, self.state.num_rounds + len(self.blocks)):
            block = self.blocks[turn % len(self.blocks)]
            if candidates := [layer for layer in block if self.state.pattern[layer] == "F"]:
                return candidates
        raise AssertionError("there is always a block to take from, because each keeps one indexer at least")

    def _measure(self, pattern: str) -> tuple[Run | None, float]:
        """Measure a candidate: its run if it beats `best_nats`, else None, and a lower bound of its nats.

        It is left when it would lose even if on every remaining row it came down to the lowest that any pattern of this
        round, the one before it among them, has there.
        """
        state, best_nats = self.state, sum(self.state.best_nats) if self.state.best_nats else inf
        run, at_least = None, 0.0
        for run in self._measured_rows(pattern):
            at_least = sum(run.nats) + sum(state.floor[len(run.nats) :])
            if at_least >= best_nats:
                break
        assert run is not None
        state.floor[: len(run.nats)] = map(min, state.floor, run.nats)
        return (run if at_least < best_nats else None), at_least

    def _result(self) -> SearchResult:
        state, runner = self.state, self.runner
        uniform = uniform_pattern(self.num_full, len(self.start)) if self.has_uniform else None
        self.total = self.done + self.has_uniform * len(runner.rows)
        uniform_loss = runner.loss(self._pass(uniform)) if uniform else None
        result = SearchResult(
            pattern=state.pattern,
            num_full=self.num_full,
            loss=sum(state.nats) / runner.num_supervised,
            start_pattern=self.start,
            start_loss=sum(state.start_nats) / runner.num_supervised,
            uniform_pattern=uniform,
            uniform_loss=uniform_loss,
            removals=tuple(state.removals),
            moves=tuple(state.moves),
            method=self.method,
            num_blocks=len(self.blocks),
            num_rows=len(runner.rows),
            num_tokens=runner.num_tokens,
            num_runs=runner.work.num_runs,
            head_layers=runner.head_layers,
            work=runner.total_work(runner.work),
            plain_work=self._plain_work(),
        )
        if self.directory is not None:
            write_json(self.directory / "result.json", result)
        return result

    def _plain_work(self) -> float:
        """Of the start and of every candidate of every round, each a whole forward pass."""
        return (1 + sum(self._plain_rounds())) * self.runner.pass_work()

    def _plain_rounds(self) -> list[int]:
        """How many candidates each round has, when every one is measured."""
        left = [sum(self.start[layer] == "F" for layer in block) for block in self.blocks]
        rounds: list[int] = []
        turn = 0
        while len(rounds) < self.start.count("F") - self.num_full:
            if left[turn % len(left)]:
                rounds.append(left[turn % len(left)])
                left[turn % len(left)] -= 1
            turn += 1
        return rounds

    def _rows_left(self) -> int:
        """Rows to measure, when every candidate is; those that need no measurement count as done."""
        rounds = self._plain_rounds()
        return len(self.runner.rows) * (sum(rounds[len(self.state.removals) :]) - len(self.state.measured))

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _save(self) -> None:
        """Write the state and say how far the search is."""
        state, work = self.state, self.runner.work
        state.layer_tokens, state.head_tokens, state.num_runs = work.layer_tokens, work.head_tokens, work.num_runs
        if self.state_file is not None:
            save_state(self.state_file, state, self.identity)
        self.done = max(self.done, self.total - self._rows_left())
        self._report()


def _without(pattern: str, layer: int) -> str:
    return f"{pattern[:layer]}S{pattern[layer + 1 :]}"


def _with(pattern: str, layer: int) -> str:
    return f"{pattern[:layer]}F{pattern[layer + 1 :]}"
