"""Training runs by name, and the one function that puts corpus, batches, losses and loop together.

indexshare train nano --output runs/nano        trains the shipped model (`make nano`)
indexshare train tiny --output runs/tiny        the same path in a minute, for a look at how it works
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from indexshare.errors import ConfigError, TrainingError
from indexshare.model import recipes as model_recipes
from indexshare.model.glm import GlmForCausalLM
from indexshare.train.data import Batch, Mixture, PackedBatches, prepare
from indexshare.train.export import export_model
from indexshare.train.initialize import initialize_induction
from indexshare.train.loop import Losses, Phase, TrainRecipe, TrainResult, train
from indexshare.train.losses import step_loss


def nano() -> TrainRecipe:
    """The shipped model: 6.4 million supervised tokens, under three hours on two cores.

    Dense attention on short rows first, because it is cheapest; then the indexers learn from dense attention while the
    model goes on (the warm-up of DSA); then everything with the keys that the indexers choose, on long documents. There
    the indexers' loss is over all visible keys: over the selected ones alone they would not learn what they miss.
    """
    sparse = Phase(
        name="sparse",
        num_steps=200,
        attention="sparse",
        index_loss_weight=1.0,
        mtp_loss_weight=0.1,
        sequence_length=16_384,
        batch_size=1,
        index_stride=64,
        index_target="visible",
        learning_rate_scale=2.0,
        data={"code": 0.25, "retrieval": 0.6, "repeats": 0.03},
    )
    return TrainRecipe(
        name="nano",
        model=model_recipes.nano(),
        phases=(
            Phase(name="dense", num_steps=600, attention="dense", trains="model", sequence_length=1024, batch_size=4),
            Phase(
                name="warm-up",
                num_steps=150,
                attention="dense",
                index_loss_weight=1.0,
                mtp_loss_weight=0.1,
                sequence_length=1024,
                batch_size=4,
            ),
            sparse,
            replace(
                sparse, name="longer", num_steps=40, sequence_length=32_768, index_stride=128, learning_rate_scale=4.0
            ),
        ),
        seed=2026,
        learning_rate_muon=5e-3,
        learning_rate_adamw=3e-3,
        warmup_steps=60,
        min_lr_ratio=0.02,
        bias_update_rate=0.005,
        precision="bf16",
        checkpoint_every=100,
        log_every=10,
        data={
            "code": 0.45,
            "retrieval": 0.35,
            "repeats": 0.1,
            "position_skips": 0.5,
            "max_position": 1_048_576,
            "induction_start": 1,
        },
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


RECIPES: dict[str, Callable[[], TrainRecipe]] = {"nano": nano, "tiny": tiny}


def recipe_named(name: str) -> TrainRecipe:
    """Raises ConfigError with the known names."""
    if name not in RECIPES:
        raise ConfigError(f"no training recipe '{name}'; there are: {', '.join(RECIPES)}")
    return RECIPES[name]()


def phase_batches(recipe: TrainRecipe, data_directory: Path) -> Callable[[int], Batch]:
    """batches(step) over all phases, each with its own length, size and order; a pure function of the step."""
    sources: list[tuple[int, PackedBatches]] = []
    first_step = 0
    for index, phase in enumerate(recipe.phases):
        data = {**recipe.data, **phase.data}
        mixture = Mixture(
            code=float(data["code"]),
            retrieval=float(data["retrieval"]),
            repeats=float(data["repeats"]),
            position_skips=float(data["position_skips"]),
            max_position=int(data["max_position"]),
        )
        source = PackedBatches(
            data_directory,
            sequence_length=phase.sequence_length,
            batch_size=phase.batch_size,
            seed=recipe.seed + index,
            mixture=mixture,
        )
        sources.append((first_step, source))
        first_step += phase.num_steps

    def batches(step: int) -> Batch:
        start, source = next(entry for entry in reversed(sources) if entry[0] <= step)
        return source.batch(step - start)

    return batches


def phase_loss(recipe: TrainRecipe) -> Callable[[nn.Module, Batch, Phase], Losses]:
    """step_loss(model, batch, phase) as the loop wants it."""

    def losses(model: nn.Module, batch: Batch, phase: Phase) -> Losses:
        assert isinstance(model, GlmForCausalLM)
        device = next(model.parameters()).device
        token_ids, targets, positions, weights = (
            torch.from_numpy(array).flatten().to(device)
            for array in (batch.token_ids, batch.targets, batch.positions, batch.loss_weights)
        )
        return step_loss(
            model,
            token_ids,
            targets,
            positions,
            weights,
            batch.segment_starts,
            attention=phase.attention,
            trains=phase.trains,
            mtp_weight=phase.mtp_loss_weight,
            index_weight=phase.index_loss_weight,
            index_stride=phase.index_stride,
            index_target=phase.index_target,
        )

    return losses


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
) -> tuple[GlmForCausalLM, TrainResult]:
    """Prepares the data below output_directory/data once, trains or resumes, writes output_directory/model.

    A run that was stopped early leaves the model as it is then. Returns the model (BF16) and how the run ended.
    accept_recipe_change: go on from a checkpoint although the recipe has changed since the run was started.
    Raises TrainingError, before anything else is done, when output_directory cannot be written to; more as in `train`.
    """
    _make_writable(output_directory)
    data_directory = output_directory / "data"
    if not (data_directory / "held_out.json").is_file():
        prepare(data_directory, tokenizer_directory=tokenizer_directory)
    model = GlmForCausalLM(recipe.model)
    model.init_weights(recipe.seed)
    if recipe.data.get("induction_start"):
        initialize_induction(model, recipe.seed)
    model.to(device)
    result = train(
        recipe,
        output_directory,
        model=model,
        batches=phase_batches(recipe, data_directory),
        step_loss=phase_loss(recipe),
        resume=resume,
        accept_recipe_change=accept_recipe_change,
        max_minutes=max_minutes,
        progress=progress,
    )
    export_model(model, data_directory, output_directory / "model")
    return model, result


def _make_writable(directory: Path) -> None:
    """Create a directory and try to write there. Raises TrainingError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise TrainingError(f"cannot write to {directory}: {error.strerror}. Name another output directory.") from error
