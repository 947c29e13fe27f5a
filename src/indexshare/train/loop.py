"""The training loop: batches in, checkpoints and a log out, resumable at any moment.

    output_directory/checkpoints/step-*    the newest two, see `checkpoint.py`
                     log.jsonl             one line per `log_every` steps

Everything that decides the next step is a function of the step or part of the checkpoint. So a run that was killed and
resumed has, on the same machine and number of threads, bit for bit the losses of a run that was not.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from indexshare.errors import ConfigError, TrainingError
from indexshare.kernels import registry
from indexshare.model.config import GlmConfig
from indexshare.train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    read_state,
    remove_incomplete,
    save_checkpoint,
)
from indexshare.train.monitor import Monitor, StopSignals, keep_log_until, last_logged_loss
from indexshare.train.optim import (
    build_optimizers,
    learning_rate_ratio,
    set_learning_rates,
    update_router_biases,
)

Batch = TypeVar("Batch")
StopReason = Literal["finished", "max_steps", "max_minutes", "signal"]

# A spike: the total loss is above both bounds in two of the last three steps. One odd batch is no divergence.
SPIKE_FACTOR = 3.0
SPIKE_MARGIN = 1.0
SPIKE_WINDOW = 64
SPIKE_MIN_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training with one objective.

    `trains` says which parameters move: "indexer" is the dense warm-up of DSA (all else frozen), "model" its opposite.
    `learning_rate_scale` multiplies the recipe's schedule in this phase; `data` replaces entries of the recipe's.
    index_stride and index_target say over which tokens and which keys the indexers' loss is taken (see `step_loss`).
    """

    name: str
    num_steps: int
    attention: Literal["dense", "sparse"]
    trains: Literal["all", "indexer", "model"] = "all"
    index_loss_weight: float = 0.0
    mtp_loss_weight: float = 0.0
    index_stride: int = 4
    index_target: Literal["selected", "visible"] = "selected"
    sequence_length: int
    batch_size: int
    learning_rate_scale: float = 1.0
    data: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """All that decides the result of a run. Learning rates are peaks; one warm-up and one cosine span all phases."""

    name: str
    model: GlmConfig
    phases: tuple[Phase, ...]
    seed: int
    learning_rate_muon: float
    learning_rate_adamw: float
    warmup_steps: int
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    bias_update_rate: float = 0.001
    muon_split: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: int = 200
    log_every: int = 10
    data: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.num_steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase that step `step` (from 0) belongs to; the last one beyond the end."""
        ends = itertools.accumulate(phase.num_steps for phase in self.phases)
        return next((phase for phase, end in zip(self.phases, ends, strict=True) if step < end), self.phases[-1])


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended. `step` counts completed steps.

    `lm_loss` is that of the last step; when this call took none, the last one in the log, or NaN for an empty log.
    """

    stopped: StopReason
    step: int
    num_tokens: int
    seconds: float
    lm_loss: float
    checkpoint: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
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
class _State:
    """What the loop itself carries from step to step; saved with every checkpoint."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    recent_losses: list[float] = field(default_factory=list)  # total losses of the current phase, newest last


def train(
    recipe: TrainRecipe,
    output_directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    batches: Callable[[int], Batch],
    step_loss: Callable[[nn.Module, Batch, Phase], Losses],
    resume: bool = True,
    accept_recipe_change: bool = False,
    max_steps: int | None = None,
    max_minutes: float | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `model` (initialised, fp32, on its device) in place.

    `batches(step)` must be a pure function of the step, from 0 over all phases. `step_loss(model, batch, phase)` does
    forward and losses, under autocast when `recipe.precision` is "bf16". `max_steps` ends the run when that many
    steps are complete in total, `max_minutes` after that much time of this call, SIGINT and SIGTERM after the running
    step; each leaves a checkpoint and changes nothing about the schedule, so that a later call continues.

    Raises TrainingError on NaN, infinity or a loss spike (naming step, last checkpoint and remedy), and when
    `output_directory` holds checkpoints and `resume` is false; ConfigError when the recipe differs from the one the run
    was started with and `accept_recipe_change` is false; CheckpointError when a checkpoint cannot be read.
    """
    run = _Run(
        recipe=recipe,
        model=model,
        optimizers=build_optimizers(
            model,
            recipe.model,
            learning_rate_muon=recipe.learning_rate_muon,
            learning_rate_adamw=recipe.learning_rate_adamw,
            weight_decay=recipe.weight_decay,
            muon_split=recipe.muon_split,
        ),
        batches=batches,
        step_loss=step_loss,
        output=Path(output_directory),
        trainable=frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
    )
    run.output.mkdir(parents=True, exist_ok=True)
    state = _resume_or_start(run, resume, accept_recipe_change)
    started = time.monotonic()
    seconds_before = state.seconds
    lm_loss = last_logged_loss(run.log)
    try:
        with StopSignals() as signals, Monitor(run.log, recipe.num_steps, state.step, progress) as monitor:
            while (stopped := _stop_reason(run, state, signals, started, max_steps, max_minutes)) is None:
                record = _train_step(run, state)
                lm_loss = record["lm"]
                state.seconds = seconds_before + time.monotonic() - started
                record["seconds"] = round(state.seconds, 3)
                monitor.report(record, log=state.step % recipe.log_every == 0 or state.step == recipe.num_steps)
                # not after a suspicious step: should it turn out a spike, the newest checkpoint is from before it
                is_calm = state.recent_losses[-1] <= spike_limit(state.recent_losses[:-1])
                if state.step % recipe.checkpoint_every == 0 and is_calm:
                    _save(run, state)
            checkpoint = _save(run, state)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in run.trainable)
    return TrainResult(
        stopped=stopped,
        step=state.step,
        num_tokens=state.num_tokens,
        seconds=state.seconds,
        lm_loss=lm_loss,
        checkpoint=checkpoint,
    )


def _resume_or_start(run: _Run, resume: bool, accept_recipe_change: bool) -> _State:
    remove_incomplete(run.checkpoints)
    found = list_checkpoints(run.checkpoints)
    if found and not resume:
        raise TrainingError(f"{run.output} holds a run already. Resume it, or name another output directory.")
    if not found:
        torch.manual_seed(run.recipe.seed)
        keep_log_until(run.log, 0)
        return _State()
    changed = _changed_fields(read_state(found[-1])["recipe"], _recipe_document(run.recipe))
    if changed and not accept_recipe_change:
        raise ConfigError(
            f"{run.output} was started with another recipe; changed: {', '.join(changed)}."
            " Name another output directory, or accept the change with --accept-recipe-change"
            " (the run is then no longer reproducible)."
        )
    document = load_checkpoint(found[-1], run.model, run.optimizers)
    keep_log_until(run.log, document["step"])
    return _State(**{entry.name: document[entry.name] for entry in dataclasses.fields(_State)})


def _save(run: _Run, state: _State) -> Path:
    document = {**dataclasses.asdict(state), "recipe": _recipe_document(run.recipe)}
    return save_checkpoint(run.checkpoints, state.step, run.model, run.optimizers, document)


def _recipe_document(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe as JSON reads it back (tuples are lists)."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields that differ, without those that do not touch the result."""
    harmless = {"checkpoint_every", "log_every"}
    return sorted(key for key in (old.keys() | new.keys()) - harmless if old.get(key) != new.get(key))


def _stop_reason(
    run: _Run,
    state: _State,
    signals: StopSignals,
    started: float,
    max_steps: int | None,
    max_minutes: float | None,
) -> StopReason | None:
    if state.step >= run.recipe.num_steps:
        return "finished"
    if max_steps is not None and state.step >= max_steps:
        return "max_steps"
    if signals.received:
        return "signal"
    if max_minutes is not None and time.monotonic() - started >= 60 * max_minutes:
        return "max_minutes"
    return None


def _train_step(run: _Run, state: _State) -> dict[str, Any]:
    """One update of the model and of `state`; returns its log record.

    Nothing is updated when the loss or the gradient is unusable.
    """
    begin = time.monotonic()
    recipe, model, phase = run.recipe, run.model, run.recipe.phase_at(state.step)
    _select_trained(run, phase)
    device = next(model.parameters()).device.type
    batch = run.batches(state.step)
    with registry.specifications(), torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
        losses = run.step_loss(model, batch, phase)
    total = float(losses.total.detach())
    recent = [] if state.step == 0 or phase is not recipe.phase_at(state.step - 1) else state.recent_losses
    if not math.isfinite(total):
        raise _failure(f"the loss is {total}", run, state)
    if state.step >= recipe.warmup_steps and is_spike([*recent, total]):
        raise _failure(f"the loss jumped to {total:.3f}, its median was {statistics.median(recent):.3f}", run, state)
    losses.total.backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradient_norm = float(nn.utils.clip_grad_norm_(trained, recipe.gradient_clip))
    if not math.isfinite(gradient_norm):
        raise _failure(f"the norm of the gradient is {gradient_norm}", run, state)
    ratio = phase.learning_rate_scale * learning_rate_ratio(
        state.step, num_steps=recipe.num_steps, warmup_steps=recipe.warmup_steps, min_ratio=recipe.min_lr_ratio
    )
    set_learning_rates(run.optimizers, ratio)
    for optimizer in run.optimizers:
        optimizer.step()
    if phase.trains != "indexer":
        update_router_biases(model, losses.expert_counts, recipe.bias_update_rate)
    state.step += 1
    state.num_tokens += losses.num_tokens
    state.recent_losses = [*recent[1 - SPIKE_WINDOW :], total]
    return {
        "step": state.step,
        "phase": phase.name,
        "loss": total,
        "lm": float(losses.lm.detach()),
        "mtp": float(losses.mtp.detach()),
        "index_kl": float(losses.index_kl.detach()),
        "learning_rate_muon": recipe.learning_rate_muon * ratio,
        "learning_rate_adamw": recipe.learning_rate_adamw * ratio,
        "gradient_norm": gradient_norm,
        "expert_imbalance": round(_imbalance(losses.expert_counts), 3),
        "tokens": state.num_tokens,
        "tokens_per_second": round(losses.num_tokens / (time.monotonic() - begin), 1),
    }


def _select_trained(run: _Run, phase: Phase) -> None:
    """Drop gradients and freeze what the phase does not train: a frozen parameter costs no backward pass."""
    for name, parameter in run.model.named_parameters():
        wanted = phase.trains == "all" or (".indexer." in name) == (phase.trains == "indexer")
        parameter.requires_grad_(wanted and name in run.trainable)
        parameter.grad = None


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


def _imbalance(expert_counts: Mapping[int, Tensor]) -> float:
    """Work of the busiest expert over the mean, in the worst layer; 1 is perfect balance."""
    return max((float(counts.max() * counts.numel() / counts.sum()) for counts in expert_counts.values()), default=1.0)


def _failure(what: str, run: _Run, state: _State) -> TrainingError:
    found = list_checkpoints(run.checkpoints)
    last = f"The last good checkpoint is {found[-1]}." if found else "There is no checkpoint yet."
    return TrainingError(
        f"Training stopped at step {state.step + 1}: {what}. {last} Look at the batch of this step,"
        " or lower the learning rates of the recipe and run again with --accept-recipe-change: that resumes from the"
        " checkpoint."
    )
