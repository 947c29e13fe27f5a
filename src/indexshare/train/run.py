"""One run: its fixed parts, what it carries from step to step, how it is resumed and how it goes back."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from indexshare.errors import CheckpointError, RecipeChangedError, TrainingError
from indexshare.train.checkpoint import (
    DAMAGED,
    DamagedCheckpointError,
    drop_checkpoints_after,
    list_checkpoints,
    load_checkpoint,
    read_state,
    remove_incomplete,
    save_checkpoint,
    set_aside,
    update_state,
)
from indexshare.train.distributed import is_main, wait_for_all, write_on_main
from indexshare.train.health import MAX_ROLLBACKS, Fault, find_non_finite, spike_limit
from indexshare.train.monitor import keep_log_until
from indexshare.train.phases import Phase, TrainRecipe


class Losses(Protocol):
    """What `step_loss` returns: `total` is what gets differentiated, the other losses are logged (means, in nats)."""

    @property
    def total(self) -> Tensor: ...
    @property
    def lm(self) -> Tensor: ...
    @property
    def mtp(self) -> Tensor: ...
    @property
    def index_kl(self) -> Tensor: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def expert_counts(self) -> Mapping[int, Tensor]:
        """By layer, [E] tokens routed to each expert, as `Trace.expert_counts` has them."""
        ...

    @property
    def mtp_acceptance(self) -> Tensor:
        """[steps], see `MtpLoss`; [0] without MTP."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """More to log."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The fixed parts of one call of `train`. `trainable` are the parameters that came with requires_grad."""

    recipe: TrainRecipe
    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    batches: Callable[[int], Any]
    step_loss: Callable[[nn.Module, Any, Phase], Losses]
    output: Path
    trainable: frozenset[str]

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    @property
    def log(self) -> Path:
        return self.output / "log.jsonl"


@dataclass(slots=True)
class State:
    """What the loop itself carries from step to step; saved with every checkpoint."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    recent_losses: list[float] = field(default_factory=list)  # what spikes are looked for in, of the current phase
    skipped: dict[str, str] = field(default_factory=dict)  # steps (from 0, as JSON has keys) without an update, and why
    rollbacks: int = 0  # since a checkpoint with an update after the steps that were left out
    warned: list[str] = field(default_factory=list)  # gauges whose limit was passed, which is said once


def resume_or_start(run: Run, resume: bool, accept_recipe_change: bool) -> State:
    """The state to go on from, with model and optimizers brought there. Errors and warnings as `loop.train` says."""
    _write(run, remove_incomplete, run.checkpoints)
    found = list_checkpoints(run.checkpoints)
    if found and not resume:
        raise TrainingError(f"{run.output} holds a run already. Resume it, or name another output directory.")
    if not found:
        if where := find_non_finite(run.model):
            raise TrainingError(f"the model has values that are not finite in {where}: start from other weights")
        torch.manual_seed(run.recipe.seed)
        _write(run, keep_log_until, run.log, 0)
        state = State()
        save(run, state)  # what a fault in the first steps goes back to; and a full disk shows now, not hours later
        return state
    for checkpoint in reversed(found):
        try:
            changed = _changed_fields(read_state(checkpoint)["recipe"], _recipe_document(run.recipe))
            if changed and not accept_recipe_change:
                raise RecipeChangedError(
                    f"{run.output} was started with another recipe or other data; changed: {', '.join(changed)}."
                    " Name another output, or remove this directory"
                )
            state = _restore(run, checkpoint)
        except DamagedCheckpointError as error:
            _write(run, set_aside, checkpoint)
            if is_main():
                warnings.warn(f"{error} It is {DAMAGED}{checkpoint.name} now; the one before is used.", stacklevel=3)
            continue
        if changed:  # what was left out may work now
            state.skipped = {step: why for step, why in state.skipped.items() if int(step) < state.step}
            state.rollbacks = 0
        _write(run, keep_log_until, run.log, state.step)
        return state
    raise CheckpointError(f"no checkpoint in {run.checkpoints} is intact. Train in another output directory.")


def _restore(run: Run, checkpoint: Path) -> State:
    document = load_checkpoint(checkpoint, run.model, run.optimizers)
    if where := find_non_finite(run.model):
        raise DamagedCheckpointError(f"{checkpoint} has values that are not finite in {where}.")
    return State(**{entry.name: document[entry.name] for entry in dataclasses.fields(State)})


def roll_back(run: Run, state: State, fault: Fault) -> State:
    """The state of the newest checkpoint from before the fault, with its batches marked as left out, there too.

    Should the checkpoint be lost before the mark is written, the same fault marks it again.
    """
    found = list_checkpoints(run.checkpoints)
    if state.rollbacks >= MAX_ROLLBACKS:
        raise _failure(fault.reason, run, state)
    earlier = [path for path in found if read_state(path)["step"] <= fault.steps.start]
    checkpoint = (earlier or found[:1])[-1]
    wait_for_all()  # nobody looks for checkpoints any more
    _write(run, drop_checkpoints_after, checkpoint)
    restored = _restore(run, checkpoint)
    restored.skipped = state.skipped | {str(step): fault.reason for step in fault.steps}
    restored.rollbacks = state.rollbacks + 1
    _write(run, update_state, checkpoint, {"skipped": restored.skipped, "rollbacks": restored.rollbacks})
    _write(run, keep_log_until, run.log, restored.step)
    first, last = fault.steps.start + 1, fault.steps.stop
    steps = f"step {last} is" if first == last else f"steps {first} to {last} are"
    if is_main():
        warnings.warn(
            f"step {state.step + 1}: {fault.reason}. Back to {checkpoint}; {steps} left out"
            f" (rollback {restored.rollbacks} of {MAX_ROLLBACKS} without a new checkpoint).",
            stacklevel=3,
        )
    return restored


def _write(run: Run, write: Callable[..., object], *arguments: Any) -> None:
    """As `write_on_main`. Raises TrainingError on all ranks."""
    try:
        write_on_main(write, *arguments)
    except OSError as error:
        raise TrainingError(f"{run.output} could not be written to ({error}). Make room and run again.") from error


def is_calm(state: State) -> bool:
    """Not after a suspicious step: should it turn out a spike, the newest checkpoint is from before it."""
    return not state.recent_losses or state.recent_losses[-1] <= spike_limit(state.recent_losses[:-1])


def last_skipped(state: State) -> int:
    """The latest step that is left out, from 0; -1 when there is none."""
    return max(map(int, state.skipped), default=-1)


def save(run: Run, state: State) -> Path:
    """Write the checkpoint of this moment; returns where it is. Raises TrainingError.

    When no update was taken since the newest one, that stays the newest: good ones are not driven out by copies.
    """
    found = list_checkpoints(run.checkpoints)
    if found and all(str(step) in state.skipped for step in range(_step_of(found[-1]), state.step)):
        return found[-1]
    document = {**dataclasses.asdict(state), "recipe": _recipe_document(run.recipe)}
    return save_checkpoint(run.checkpoints, state.step, run.model, run.optimizers, document)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _recipe_document(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe as JSON reads it back (tuples are lists)."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields that differ, as "seed" or "data.sources", without those that do not touch the result."""
    harmless = {"checkpoint_every", "log_every"}
    old, new = _flattened(old), _flattened(new)
    return sorted(key for key in (old.keys() | new.keys()) - harmless if old.get(key) != new.get(key))


def _flattened(document: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _failure(what: str, run: Run, state: State) -> TrainingError:
    found = list_checkpoints(run.checkpoints)
    last = f"The last good checkpoint is {found[-1]}." if found else "There is no checkpoint yet."
    return TrainingError(
        f"Training stopped at step {state.step + 1}: {what}. Going back {state.rollbacks} times and leaving batches out"
        f" did not help. {last} Look at the batch of this step, or lower the learning rates and run again: that goes on"
        " from the checkpoint"
    )
