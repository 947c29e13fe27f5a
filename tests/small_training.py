"""A training run of seconds: the tiny model, three phases, counting sequences to learn."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from indexshare.model.glm import GlmForCausalLM
from indexshare.model.recipes import tiny
from indexshare.train import losses
from indexshare.train.loop import Phase, TrainRecipe, TrainResult, train

LENGTH = 24
CONFIG = tiny(vocab_size=64)
DENSE = Phase(name="dense", num_steps=4, attention="dense", trains="model", sequence_length=LENGTH, batch_size=2)
INDEXER = Phase(
    name="indexer",
    num_steps=3,
    attention="dense",
    trains="indexer",
    index_loss_weight=1.0,
    sequence_length=LENGTH,
    batch_size=2,
)
SPARSE = Phase(
    name="sparse",
    num_steps=5,
    attention="sparse",
    index_loss_weight=1.0,
    mtp_loss_weight=0.3,
    sequence_length=LENGTH,
    batch_size=2,
)
RECIPE = TrainRecipe(
    name="test",
    model=CONFIG,
    phases=(DENSE, INDEXER, SPARSE),
    seed=7,
    learning_rate_muon=0.02,
    learning_rate_adamw=0.01,
    warmup_steps=2,
    checkpoint_every=3,
    log_every=1,
)


def new_model() -> GlmForCausalLM:
    model = GlmForCausalLM(CONFIG)
    model.init_weights(RECIPE.seed)
    return model


def batches(step: int) -> Tensor:
    """[2, LENGTH] int64: counting sequences, so that there is something to learn; a function of the step."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 16, (2, 1), generator=generator)
    return (starts + torch.arange(LENGTH)) % 16


def step_loss(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
    assert isinstance(model, GlmForCausalLM)
    targets = batch.roll(-1, dims=1)
    targets[:, -1] = losses.IGNORED
    return losses.step_loss(
        model,
        batch.flatten(),
        targets.flatten(),
        torch.arange(LENGTH).repeat(len(batch)),
        torch.ones(batch.numel()),
        tuple(range(0, batch.numel() + 1, LENGTH)),
        attention=phase.attention,
        trains=phase.trains,
        mtp_weight=phase.mtp_loss_weight,
        index_weight=phase.index_loss_weight,
        balance_weight=phase.balance_loss_weight,
    )


def run(
    directory: Path,
    recipe: TrainRecipe = RECIPE,
    loss: Callable[[nn.Module, Tensor, Phase], losses.Losses] = step_loss,
    model: nn.Module | None = None,
    resume: bool = True,
    accept_recipe_change: bool = False,
    max_steps: int | None = None,
    max_minutes: float | None = None,
) -> TrainResult:
    return train(
        recipe,
        directory,
        model=model or new_model(),
        batches=batches,
        step_loss=loss,
        resume=resume,
        accept_recipe_change=accept_recipe_change,
        max_steps=max_steps,
        max_minutes=max_minutes,
        progress=False,
    )


def read_log(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def without_time(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def checkpoint_bytes(path: Path) -> tuple[bytes, bytes]:
    return (path / "model.safetensors").read_bytes(), (path / "optimizer.safetensors").read_bytes()


def checkpoint_directory(directory: Path) -> Path:
    return directory / "checkpoints"


def environment() -> dict[str, str]:
    """For processes that import this module and the package as the test does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
