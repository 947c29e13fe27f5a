"""Training runs by name or from a file, and the one function that puts data, losses and loop together.

indexshare train nano --output runs/nano        trains the shipped model (`make nano`)
indexshare train tiny --output runs/tiny        the same path in a minute, for a look at how it works
indexshare train chats.toml                     data of one's own, see `recipes_file`
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.resolve import resolve_model
from indexshare.errors import ConfigError
from indexshare.model import recipes as model_recipes
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model
from indexshare.train.data import Batch, prepare
from indexshare.train.distributed import Mesh, is_main, wait_for_all
from indexshare.train.export import export_model
from indexshare.train.initialize import initialize_induction
from indexshare.train.loop import Losses, Phase, TrainRecipe, TrainResult, train
from indexshare.train.losses import step_loss
from indexshare.train.parallel import ContextShare, Weights, context_share, whole_model
from indexshare.train.pipeline import Pipeline, pipeline_place
from indexshare.train.recipes_file import read_recipe, with_ends
from indexshare.train.recipes_nano import nano, nano_long, nano_longest
from indexshare.train.recipes_run import (
    StepLoss,
    check_phases,
    first_model,
    make_writable,
    phase_batches,
    read_texts,
    rollout_batches,
    row_batches,
    with_contents,
    without_critic,
)


def tiny() -> TrainRecipe:
    """A minute of the same path on the tiny model."""
    return TrainRecipe(
        name="tiny",
        model=model_recipes.tiny(vocab_size=4096),
        phases=(
            Phase(name="dense", num_steps=30, attention="dense", trains="model", sequence_length=512, batch_size=4),
            Phase(
                name="sparse",
                num_steps=20,
                attention="sparse",
                index_loss_weight=1.0,
                mtp_loss_weight=0.1,
                sequence_length=512,
                batch_size=4,
            ),
        ),
        seed=2026,
        learning_rate_muon=5e-3,
        learning_rate_adamw=3e-3,
        warmup_steps=10,
        checkpoint_every=25,
        log_every=5,
        data={
            "code": 0.5,
            "retrieval": 0.35,
            "repeats": 0.1,
            "position_skips": 0.5,
            "max_position": 131_072,
        },
    )


RECIPES: dict[str, Callable[[], TrainRecipe]] = {
    "nano": nano,
    "nano-long": nano_long,
    "nano-longest": nano_longest,
    "tiny": tiny,
}


def recipe_named(name: str) -> TrainRecipe:
    """The recipe of a name or of a TOML file. Raises ConfigError with the known names, and as `read_recipe`."""
    if name.endswith(".toml"):
        return read_recipe(Path(name))
    if name not in RECIPES:
        raise ConfigError(f"no training recipe '{name}'; there are: {', '.join(RECIPES)}, and files that end in .toml")
    return RECIPES[name]()


def phase_loss(
    context: ContextShare | None = None, pipeline: Pipeline | None = None
) -> Callable[[nn.Module, Batch, Phase], Losses]:
    """step_loss(model, batch, phase) as the loop wants it; context: the ranks that divide the tokens of a batch,
    pipeline: those that divide the layers, through which its rows go one after another."""

    def losses(model: nn.Module, batch: Batch, phase: Phase) -> Losses:
        assert isinstance(model, GlmForCausalLM)
        device = next(model.parameters()).device
        parts = [batch] if pipeline is None else [batch.rows(row, row + 1) for row in range(len(batch.token_ids))]
        if context is None:  # else ranks have to divide it evenly
            parts = [part.without_padding() for part in parts]
        offsets = list(accumulate((part.token_ids.size for part in parts), initial=0))
        token_ids, targets, positions, weights = (
            torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
            for arrays in zip(
                *((part.token_ids, part.targets, part.positions, part.loss_weights) for part in parts), strict=True
            )
        )
        starts = [start + offset for part, offset in zip(parts, offsets, strict=False) for start in part.segment_starts]
        return step_loss(
            model,
            token_ids,
            targets,
            positions,
            weights,
            (*dict.fromkeys(starts),),  # a part ends where the next begins
            attention=phase.attention,
            trains=phase.trains,
            mtp_weight=phase.mtp_loss_weight,
            mtp_num_steps=phase.mtp_num_steps,
            mtp_objective=phase.mtp_objective,
            index_weight=phase.index_loss_weight,
            index_stride=phase.index_stride,
            index_target=phase.index_target,
            recompute=phase.recompute,
            balance_weight=phase.balance_loss_weight,
            context=context,
            pipeline=pipeline,
            part_starts=tuple(offsets[:-1]),
        )

    return losses


def shared_loss(mesh: Mesh, device: str) -> Callable[[nn.Module, Batch, Phase], Losses]:
    """`phase_loss` of a run over a mesh."""
    device = torch.device(device).type
    return phase_loss(context_share(mesh, device), pipeline_place(mesh, device))


def run(
    recipe: TrainRecipe,
    output_directory: Path,
    *,
    tokenizer_directory: Path | None = None,
    resume: bool = True,
    accept_recipe_change: bool = False,
    max_minutes: float | None = None,
    progress: bool = True,
    device: str = "cpu",
    mesh: Mesh | None = None,
) -> tuple[GlmForCausalLM, TrainResult]:
    """Trains or resumes, and writes output_directory/model. A named recipe prepares its data below it once.

    A run that was stopped early leaves the model as it is then. Returns the model (BF16) and how the run ended;
    of several processes the main one has and writes the model. mesh: how they share the work.
    accept_recipe_change: go on from a checkpoint although the recipe has changed since the run was started.
    Raises, before anything else is done, ConfigError for a phase that could not run (`check_phases`) and TrainingError
    when output_directory cannot be written to; more as in `train`.
    """
    mesh = mesh or Mesh.over_all()
    check_phases(recipe, mesh)
    make_writable(output_directory)
    if "kind" in recipe.data:
        job = _own_job(recipe, output_directory, device, mesh)
        recipe = with_contents(recipe)
    else:
        job = _named_job(recipe, output_directory, device, tokenizer_directory, mesh)
    result = train(
        recipe,
        output_directory,
        model=job.model,
        weights=job.weights,
        batches=job.batches,
        step_loss=job.step_loss,
        resume=resume,
        accept_recipe_change=accept_recipe_change,
        max_minutes=max_minutes,
        progress=progress,
        mesh=mesh,
    )
    without_critic(job.model)
    model = whole_model(job.model, mesh)
    if is_main():
        export_model(model, job.tokenizer_directory, output_directory / "model")
    return model, result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What the loop is given: the model, batches and loss; and whose tokenizer is exported. weights: as `train` has
    them."""

    model: GlmForCausalLM
    weights: Weights | None = None
    batches: Callable[[int], Any]
    step_loss: StepLoss
    tokenizer_directory: Path


def _named_job(recipe: TrainRecipe, output: Path, device: str, tokenizer_directory: Path | None, mesh: Mesh) -> _Job:
    """Code and generated episodes, prepared in output/data."""
    directory = output / "data"
    start = _first_weights(recipe)
    tokenizer_directory = tokenizer_directory or start
    if is_main() and not (directory / "held_out.json").is_file():
        prepare(directory, tokenizer_directory=tokenizer_directory)
    wait_for_all()
    if start is not None:
        model = load_model(start, dtype=torch.float32)
    else:
        model = GlmForCausalLM(with_ends(recipe.model, Tokenizer.from_directory(directory)))
        model.init_weights(recipe.seed)
    if recipe.data.get("induction_start"):
        initialize_induction(model, recipe.seed)
    return _Job(
        model=model.to(device),
        batches=_share_of(phase_batches(recipe, directory), mesh),
        step_loss=shared_loss(mesh, device),
        tokenizer_directory=directory,
    )


def _first_weights(recipe: TrainRecipe) -> Path | None:
    """The model that a recipe goes on from. Raises ConfigError, naming the recipe that makes it when there is one."""
    if "start" not in recipe.data:
        return None
    start = Path(str(recipe.data["start"]))
    before = start.parent.name
    if before in RECIPES and not start.is_dir():
        raise ConfigError(
            f"{recipe.name} goes on from {start}, which is not there: first run `indexshare train {before}`,"
            " from this directory and without --output"
        )
    return resolve_model(str(start))


def _share_of(batches: Callable[[int], Batch], mesh: Mesh) -> Callable[[int], Batch]:
    """This rank's rows of each batch."""
    return lambda step: mesh.rows_of(batches(step))


def _own_job(recipe: TrainRecipe, output: Path, device: str, mesh: Mesh) -> _Job:
    """A recipe from a file."""
    texts = read_texts(recipe)
    model, weights = first_model(recipe)
    model = model if weights else model.to(device)
    if recipe.data["kind"] == "rl":
        rollouts, loss = rollout_batches(recipe, texts, model, output)
        return _Job(model=model, batches=rollouts, step_loss=loss, tokenizer_directory=texts.directory)
    return _Job(
        model=model,
        weights=weights,
        batches=_share_of(row_batches(recipe, texts, cp=mesh.cp), mesh),
        step_loss=shared_loss(mesh, device),
        tokenizer_directory=texts.directory,
    )
