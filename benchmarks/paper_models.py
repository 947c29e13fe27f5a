"""The models of the paper's table: trained here, with an indexer in every layer, then with fewer.

Each function does one stage in a directory of its own, goes on where it was stopped, and returns plain data.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from distillation import own_layers_only

from indexshare.engine.resolve import packaged_model
from indexshare.errors import TrainingError
from indexshare.model import recipes as model_recipes
from indexshare.model.config import GlmConfig
from indexshare.model.weights import load_model
from indexshare.share.attach import attach_indexers
from indexshare.share.calibration import CalibrationRow
from indexshare.share.distill import Schedule, stages
from indexshare.share.search import PatternSearch, uniform_pattern
from indexshare.train import losses, recipes
from indexshare.train.data import Mixture, PackedBatches
from indexshare.train.export import export_model
from indexshare.train.loop import train
from indexshare.train.phases import TrainRecipe

NUM_LAYERS = 8
EVERY = "F" * NUM_LAYERS
MIXTURE = {"code": 0.45, "retrieval": 0.45, "repeats": 0.03, "position_skips": 0.0, "max_position": 1_048_576}
FIRST_SEED = 5200  # of the base models; far from those of the shipped model


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Documents of one length, and the questions about each of them."""

    num_tokens: int
    num_documents: int
    num_questions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of everything. phases: steps of the base model's dense, warm-up, sparse and longer phase."""

    name: str
    model: GlmConfig
    is_structured: bool
    phases: tuple[int, int, int, int]
    lengths: tuple[int, int, int, int]
    distilled: Schedule
    calibration_rows: int
    held_out_files: int | None
    readings: tuple[Reading, ...]
    dense_up_to: int  # tokens of the longest documents that are read with attention to all keys
    compared_at: int  # tokens of the documents of several facts and of walks, and of the rows whose mass is measured
    walk_documents: int
    walks: int  # in each of them
    mass_rows: int


def _shape(**changes: object) -> dict[str, object]:
    return {"num_nextn_predict_layers": 0, "index_share_for_mtp_iteration": False, **changes}


def full_plan() -> Plan:
    """nano's shape with eight indexers and without its MTP layer, about 0.6 of its training."""
    return Plan(
        name="full",
        model=model_recipes.nano(**_shape(index_topk_freq=1)),
        is_structured=True,
        phases=(360, 100, 110, 16),
        lengths=(1024, 1024, 16_384, 32_768),
        distilled=Schedule(
            warmup_steps=100,
            sparse_steps=50,
            length=8192,
            batch_size=1,
            sparse_rate=3e-4,
            stride=32,
            checkpoint_every=20,
        ),
        calibration_rows=8,
        held_out_files=None,
        readings=(
            Reading(num_tokens=4096, num_documents=3, num_questions=8),
            Reading(num_tokens=16_384, num_documents=2, num_questions=24),
            Reading(num_tokens=65_536, num_documents=1, num_questions=32),
            Reading(num_tokens=131_072, num_documents=1, num_questions=32),
        ),
        dense_up_to=65_536,
        compared_at=16_384,
        walk_documents=2,
        walks=12,
        mass_rows=2,
    )


def quick_plan() -> Plan:
    """The same stages in a minute on a model that learns nothing: to see that they work."""
    return Plan(
        name="quick",
        model=model_recipes.tiny(
            **_shape(vocab_size=4096, num_hidden_layers=NUM_LAYERS, index_topk_pattern=EVERY, index_topk=32)
        ),
        is_structured=False,
        phases=(2, 1, 2, 1),
        lengths=(256, 256, 512, 1024),
        distilled=Schedule(warmup_steps=1, sparse_steps=1, length=512, batch_size=1, stride=16),
        calibration_rows=1,
        held_out_files=2,
        readings=(Reading(num_tokens=1024, num_documents=1, num_questions=4),),
        dense_up_to=1024,
        compared_at=1024,
        walk_documents=1,
        walks=2,
        mass_rows=1,
    )


def base_recipe(plan: Plan, seed: int) -> TrainRecipe:
    """That of `nano` with the sizes of the plan: dense on short rows, warm-up of indexers, sparse on longer rows."""
    nano = recipes.nano()
    phases = tuple(
        replace(phase, num_steps=steps, sequence_length=length, mtp_loss_weight=0.0, recompute=length > 16_384)
        for phase, steps, length in zip(nano.phases, plan.phases, plan.lengths, strict=True)
    )
    data = {**nano.data, "induction_start": int(plan.is_structured)}
    return replace(
        nano,
        name=f"paper-{plan.name}",
        model=plan.model,
        phases=phases,
        seed=FIRST_SEED + seed,
        warmup_steps=min(nano.warmup_steps, plan.phases[0]),
        checkpoint_every=20,
        data=data,
    )


def train_base(plan: Plan, seed: int, directory: Path) -> dict[str, float]:
    """directory/base/model, an indexer in every layer. Raises TrainingError when a signal ended it."""
    recipe = base_recipe(plan, seed)
    _, result = recipes.run(recipe, directory / "base", tokenizer_directory=packaged_model())
    _check_finished(result.step, recipe)
    return {"lm_loss": result.lm_loss, "seconds": result.seconds}


def search_patterns(plan: Plan, seed: int, directory: Path) -> dict[str, str]:
    """One greedy search down to one indexer -> its patterns with four, two and one, by "1/2", "1/4", "1/8".

    The calibration rows are of the kind that the model was trained on, with other facts.
    """
    model = load_model(directory / "base" / "model", dtype=torch.float32)
    rows = calibration(plan, directory / "base" / "data", seed)
    found = PatternSearch(model, rows, keep="1/8", method="greedy", directory=directory / "search").search()
    by_count = {removal.pattern.count("F"): removal.pattern for removal in found.removals}
    return {f"1/{NUM_LAYERS // count}": by_count[count] for count in (4, 2, 1)}


def calibration(plan: Plan, data: Path, seed: int) -> tuple[CalibrationRow, ...]:
    """Rows of the length of distillation."""
    length = plan.distilled.length
    assert length is not None, "the plans say it"
    source = PackedBatches(
        data, sequence_length=length, batch_size=1, seed=FIRST_SEED + 100 + seed, mixture=mixture_of(MIXTURE)
    )
    return tuple(
        CalibrationRow.from_batch(source.batch(index), torch.device("cpu")) for index in range(plan.calibration_rows)
    )


def mixture_of(data: dict[str, float]) -> Mixture:
    """As `PackedBatches` wants it."""
    return Mixture(
        code=data["code"],
        retrieval=data["retrieval"],
        repeats=data["repeats"],
        position_skips=data["position_skips"],
        max_position=int(data["max_position"]),
    )


def uniform(keep: str) -> str:
    """Equal spacing for "1/2", "1/4" or "1/8"."""
    return uniform_pattern(NUM_LAYERS // int(keep[2:]), NUM_LAYERS)


def distill(plan: Plan, seed: int, directory: Path, name: str, pattern: str, *, cross_layer: bool) -> dict[str, float]:
    """directory/name/model: the base model with `pattern`, trained by both stages of `share distill`.

    The stages are those of `share.distill`; the rows are those that the base model was trained on, because a model this
    small forgets retrieval on code alone. cross_layer: False trains each indexer on its own layer only.
    """
    base, run = directory / "base", directory / name
    student = attach_indexers(load_model(base / "model", dtype=torch.float32), pattern)
    assert plan.distilled.length is not None, "the plans say it"
    seconds = lm_loss = 0.0
    loss = losses.index_loss if cross_layer else own_layers_only
    for offset, recipe in enumerate(stages(student, plan.distilled, plan.distilled.length)):
        recipe = replace(recipe, seed=FIRST_SEED + 200 + 10 * seed + offset, precision="bf16", data=MIXTURE)
        with mock.patch.object(losses, "index_loss", loss):
            result = train(
                recipe,
                run / recipe.name,
                model=student,
                batches=recipes.phase_batches(recipe, base / "data"),
                step_loss=recipes.phase_loss(),
            )
        _check_finished(result.step, recipe)
        seconds, lm_loss = seconds + result.seconds, result.lm_loss
    staging = run / ".model"
    export_model(student, base / "model", staging)
    shutil.rmtree(run / "model", ignore_errors=True)  # of a run that was stopped after this
    os.replace(staging, run / "model")
    for recipe_directory in ("warm-up", "sparse"):
        shutil.rmtree(run / recipe_directory / "checkpoints", ignore_errors=True)
    return {"lm_loss": lm_loss, "seconds": seconds}


def _check_finished(step: int, recipe: TrainRecipe) -> None:
    if step < recipe.num_steps:
        raise TrainingError(
            f"{recipe.name} was stopped at step {step:,} of {recipe.num_steps:,}: the same command goes on there"
        )
