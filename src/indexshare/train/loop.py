"""The training loop: batches in, checkpoints and a log out, resumable at any moment.

    output_directory/checkpoints/step-*    the newest two, see `checkpoint.py`
                     log.jsonl             one line per `log_every` steps, and for each step that was left out

Everything that decides the next step is a function of the step or part of the checkpoint. So a run that was killed and
resumed has, on the same machine and number of threads, bit for bit the losses of a run that was not. A step that ends
in a loss spike, NaN or infinity does not stand: the run goes back to a checkpoint and leaves that batch out.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from indexshare.errors import KernelError
from indexshare.kernels import native
from indexshare.train.distributed import Mesh, agree, clip_gradients, is_main, num_ranks, over_all_ranks
from indexshare.train.gauges import Gauges, beyond_limits
from indexshare.train.health import SPIKE_WINDOW, Fault, find_non_finite, find_spike
from indexshare.train.monitor import Monitor, StopSignals, last_logged_loss, shown_loss
from indexshare.train.optim import (
    build_optimizers,
    learning_rate_ratio,
    set_learning_rates,
    update_router_biases,
)
from indexshare.train.parallel import StepModule, Weights, fill, parallelize
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.provenance import explain_non_finite
from indexshare.train.run import Losses, Run, State, is_calm, last_skipped, resume_or_start, roll_back, save

Batch = TypeVar("Batch")
StopReason = Literal["finished", "max_steps", "max_minutes", "signal"]
STOP_REASONS: tuple[StopReason | None, ...] = (None, "max_minutes", "signal", "max_steps", "finished")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended. `step` counts completed steps.

    `lm_loss` is that of the last step, its total loss where the model was frozen; when this call took no step, the
    last one in the log, or NaN for an empty log.
    """

    stopped: StopReason
    step: int
    num_tokens: int
    seconds: float
    lm_loss: float
    checkpoint: Path


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
    mesh: Mesh | None = None,
    weights: Weights | None = None,
) -> TrainResult:
    """Train `model` (initialised, fp32, on its device) in place.

    `batches(step)` must be a pure function of the step, from 0 over all phases. `step_loss(model, batch, phase)` does
    forward and losses, under autocast when `recipe.precision` is "bf16". `max_steps` ends the run when that many
    steps are complete in total, `max_minutes` after that much time of this call, SIGINT and SIGTERM after the running
    step; each leaves a checkpoint and changes nothing about the schedule, so that a later call continues.

    On several ranks (`distributed.py`) all of them call this with the same model and recipe, `batches` that give each
    its rows, and a `step_loss` that gives each its part of the means over all. `mesh`: by default everything is dp.
    `weights`: then the model is on "meta", and these are all its weights (fp32) by name, which no rank holds at once.

    A loss spike, or a NaN or infinity in loss, gradient or weights is a warning that names its origin: the run goes
    back to its last checkpoint and leaves the batches around it out. A damaged checkpoint is a warning, too, and the
    one before it is used.

    Raises TrainingError when going back did not help (naming step, last checkpoint and remedy), when a checkpoint
    cannot be written, and when `output_directory` holds checkpoints and `resume` is false; ConfigError when the recipe
    differs from the one the run was started with and `accept_recipe_change` is false; CheckpointError when no
    checkpoint is intact or they belong to another model.
    """
    native.enable()  # the choice of keys, sparse attention, and all of a model that is frozen
    step = StepModule(model, step_loss)
    parallelize(step, mesh or Mesh.over_all(), precision=recipe.precision)
    if weights is not None:
        fill(step, weights)
    run = Run(
        recipe=recipe,
        model=model,
        optimizers=build_optimizers(
            model,
            recipe.model,
            learning_rate_muon=recipe.learning_rate_muon,
            learning_rate_adamw=recipe.learning_rate_adamw,
            weight_decay=recipe.weight_decay,
            muon_split=recipe.muon_split,
            muon_dtype=torch.float32 if recipe.precision == "fp32" else torch.bfloat16,
        ),
        batches=batches,
        step_loss=lambda _, batch, phase: step(batch, phase)[1],
        output=Path(output_directory),
        trainable=frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
    )
    run.output.mkdir(parents=True, exist_ok=True)
    state = resume_or_start(run, resume, accept_recipe_change)
    started = time.monotonic()
    seconds_before = state.seconds
    lm_loss = last_logged_loss(run.log)
    try:
        with (
            StopSignals() as signals,
            Monitor(
                run.log if is_main() else Path(os.devnull), recipe.phases, state.step, progress and is_main()
            ) as monitor,
        ):
            while (
                stopped := agree(STOP_REASONS, _stop_reason(run, state, signals, started, max_steps, max_minutes))
            ) is None:
                is_logged = (state.step + 1) % recipe.log_every == 0 or state.step + 1 == recipe.num_steps
                record = _skip_step(run, state) or _train_step(run, state, is_logged)
                if isinstance(record, Fault):
                    state = roll_back(run, state, record)
                    monitor.rewind(state.step)
                    continue
                lm_loss = lm_loss if "skipped" in record else shown_loss(record)
                state.seconds = seconds_before + time.monotonic() - started
                record["seconds"] = round(state.seconds, 3)
                monitor.report(record, log=is_logged or "skipped" in record)
                if state.step % recipe.checkpoint_every == 0 and is_calm(state):
                    has_recovered = state.step > last_skipped(state) + 1  # a step after them was taken
                    state.rollbacks = 0 if has_recovered else state.rollbacks
                    save(run, state)
            checkpoint = save(run, state)
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


def _stop_reason(
    run: Run,
    state: State,
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


def _skip_step(run: Run, state: State) -> dict[str, Any] | None:
    """Pass over a step that was left out; its log record, or None when it was not."""
    if str(state.step) not in state.skipped:
        return None
    state.recent_losses = _usual_losses(run, state)
    reason = state.skipped[str(state.step)]
    state.step += 1
    return {"step": state.step, "phase": run.recipe.phase_at(state.step - 1).name, "skipped": reason}


def _usual_losses(run: Run, state: State) -> list[float]:
    """Losses that those of the running step can be compared with: of the same phase."""
    recipe = run.recipe
    is_first = state.step == 0 or recipe.phase_at(state.step) is not recipe.phase_at(state.step - 1)
    return [] if is_first else state.recent_losses


def _predicts_text(recipe: TrainRecipe, phase: Phase) -> bool:
    """Whether the language-model loss is what falls: not where the model is frozen, nor in reinforcement learning."""
    return phase.trains in ("all", "model") and recipe.data.get("kind") != "rl"


def _forward(run: Run, batch: Any, phase: Phase) -> Losses:
    device = next(run.model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=run.recipe.precision == "bf16"):
        return run.step_loss(run.model, batch, phase)


def _train_step(run: Run, state: State, is_logged: bool) -> dict[str, Any] | Fault:
    """One update of the model and of `state`; returns its log record, with gauges when it `is_logged`.

    When the loss, the gradient or the weights after it are unusable, the fault is returned and `state` is as it was.
    """
    begin = time.monotonic()
    recipe, model, phase = run.recipe, run.model, run.recipe.phase_at(state.step)
    _select_trained(run, phase)
    batch = run.batches(state.step)
    gauges = Gauges(model) if is_logged else None

    def fault(what: str) -> Fault:
        if num_ranks() > 1:  # looking for the origin, ranks would part ways
            return Fault(reason=f"{what} (one process says where it began)", steps=range(state.step, state.step + 1))
        origin = explain_non_finite(model, lambda: _forward(run, batch, phase).total)
        return Fault(reason=f"{what}: {origin}", steps=range(state.step, state.step + 1))

    try:
        with gauges or contextlib.nullcontext():
            losses = _forward(run, batch, phase)
    except KernelError as error:  # operations that choose refuse NaN
        if num_ranks() > 1:  # the others wait inside the step: the run ends, and is resumed
            raise
        return fault(str(error))
    own_total, losses = losses.total, over_all_ranks(losses)
    total = float(losses.total.detach())
    watched = float((losses.lm if _predicts_text(recipe, phase) else losses.total).detach())
    usual = _usual_losses(run, state)
    if not math.isfinite(total):
        return fault(f"the loss is {total}")
    if state.step >= recipe.warmup_steps and (spike := find_spike([*usual, watched], state.step)):
        return spike
    if own_total.requires_grad:  # a stage may have nothing to train
        own_total.backward()
    readings = gauges.read(losses.expert_counts, run.optimizers) if gauges else {}
    gradient_norm = float(clip_gradients(model.parameters(), recipe.gradient_clip))
    if not math.isfinite(gradient_norm):
        return fault(f"the norm of the gradient is {gradient_norm}")
    ratio = phase.learning_rate_scale * learning_rate_ratio(
        state.step, num_steps=recipe.num_steps, warmup_steps=recipe.warmup_steps, min_ratio=recipe.min_lr_ratio
    )
    set_learning_rates(run.optimizers, ratio)
    for optimizer in run.optimizers:
        optimizer.step()
    if phase.trains != "indexer":
        update_router_biases(model, losses.expert_counts, recipe.bias_update_rate)
    if where := find_non_finite(model):
        reason = f"the update made values that are not finite in {where}"
        return Fault(reason=reason, steps=range(state.step, state.step + 1))
    state.step += 1
    state.num_tokens += losses.num_tokens
    state.recent_losses = [*usual[1 - SPIKE_WINDOW :], watched]
    _warn_once(state, readings)
    return {
        "step": state.step,
        "phase": phase.name,
        "loss": total,
        "lm": float(losses.lm.detach()),
        "mtp": float(losses.mtp.detach()),
        "mtp_acceptance": [round(float(share), 4) for share in losses.mtp_acceptance],
        "index_kl": float(losses.index_kl.detach()),
        **losses.metrics,
        "learning_rate_muon": recipe.learning_rate_muon * ratio,
        "learning_rate_adamw": recipe.learning_rate_adamw * ratio,
        "gradient_norm": gradient_norm,
        **readings,
        "tokens": state.num_tokens,
        "tokens_per_second": round(losses.num_tokens / (time.monotonic() - begin), 1),
    }


def _select_trained(run: Run, phase: Phase) -> None:
    """Drop gradients and freeze what the phase does not train: a frozen parameter costs no backward pass."""
    mtp_layer = f"model.layers.{run.recipe.model.num_hidden_layers}."
    for name, parameter in run.model.named_parameters():
        if phase.trains == "mtp":
            wanted = name.startswith(mtp_layer)
        else:
            wanted = phase.trains == "all" or (".indexer." in name) == (phase.trains == "indexer")
        parameter.requires_grad_(wanted and name in run.trainable)
        parameter.grad = None


def _warn_once(state: State, readings: Mapping[str, Any]) -> None:
    for name, message in beyond_limits(readings).items():
        if name not in state.warned:
            state.warned.append(name)
            if is_main():
                warnings.warn(f"step {state.step}: {message}", stacklevel=4)
