"""What a recipe trains on: whether its phases can run, its first weights, its batches and its loss."""

import hashlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from indexshare.chat.template import ChatTemplate
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.files import is_json_lines, source_files
from indexshare.data.rows import Batch, built_data, open_rows
from indexshare.data.shards import INDEX
from indexshare.engine.resolve import resolve_tokenizer
from indexshare.errors import ConfigError, TrainingError
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.opening import open_checkpoint
from indexshare.model.weights import load_model
from indexshare.train.data import Mixture, PackedBatches
from indexshare.train.distributed import Mesh, num_ranks
from indexshare.train.loop import Losses
from indexshare.train.parallel import Weights
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.recipes_file import PretrainOptions, options_of, start_directory
from indexshare.train.rl import RlOptions, RolloutLoss, Rollouts, read_tasks
from indexshare.train.rl_losses import ValueHead
from indexshare.train.sft import ChatRows, SftOptions
from indexshare.train.sharded_checkpoint import file_digest

StepLoss = Callable[[nn.Module, Any, Phase], Losses]


class Rows(Protocol):
    """Rows of one length: `TokenRows` or `ChatRows`."""

    def batch(self, step: int, batch_size: int) -> Batch: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The tokenizer of a run with its chat template, and the directory that both come from."""

    directory: Path
    tokenizer: Tokenizer
    template: ChatTemplate


def check_phases(recipe: TrainRecipe, mesh: Mesh) -> None:
    """Raises ConfigError for a phase that could not run: on these processes, or with this model."""
    if recipe.data.get("kind") == "rl" and mesh.num_ranks > 1:
        raise ConfigError(f"{recipe.name}: reinforcement learning runs in one process; start it without torchrun")
    for phase in recipe.phases:
        where = f"{recipe.name}, phase {phase.name!r}"
        if phase.trains == "mtp" and not (phase.mtp_loss_weight and recipe.model.num_nextn_predict_layers):
            raise ConfigError(
                f"{where}: training the MTP layer needs a model that has one, and mtp_loss_weight above 0"
            )
        if phase.batch_size % mesh.num_batches:
            raise ConfigError(
                f"{where}: batch_size is {phase.batch_size:,}, which {mesh.num_batches} processes (dp x ep) cannot"
                f" share evenly: set it to a multiple of {mesh.num_batches}, or start fewer processes"
            )
        if phase.sequence_length % mesh.cp:
            raise ConfigError(
                f"{where}: sequence_length is {phase.sequence_length:,}, which {mesh.cp} processes (cp) cannot share"
                f" evenly: set it to a multiple of {mesh.cp}"
            )
        if phase.balance_loss_weight and mesh.cp > 1:
            raise ConfigError(
                f"{where}: balance_loss_weight is {phase.balance_loss_weight:g} and looks at whole sequences, which"
                f" --cp {mesh.cp} divides: set it to 0, also where it is left out, or train without --cp"
            )


def make_writable(directory: Path) -> None:
    """Create a directory and try to write there. Raises TrainingError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise TrainingError(f"cannot write to {directory}: {error.strerror}. Name another output directory.") from error


def with_contents(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with a digest of what its sources hold, so that a run does not go on with other data."""
    digest = hashlib.sha256()
    for data in (recipe.data, *(phase.data for phase in recipe.phases)):
        for source in str(data["sources"]).split("\n") if "sources" in data else ():
            built = built_data(source)  # its index has the digests of its files
            for file in source_files(source) if built is None else [built / INDEX]:
                if built or recipe.data["kind"] == "pretrain" or is_json_lines(file):  # others are not read
                    digest.update(f"{file.relative_to(source)} {file_digest(file)}\n".encode())
    return replace(recipe, data={**recipe.data, "contents": digest.hexdigest()})


def read_texts(recipe: TrainRecipe) -> Texts:
    """Raises ConfigError when the tokenizer has ids that the model does not have."""
    directory = resolve_tokenizer(str(recipe.data["tokenizer"]))
    tokenizer = Tokenizer.from_directory(directory)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise ConfigError(
            f"{recipe.name}: the tokenizer has {tokenizer.vocab_size:,} ids, the model {recipe.model.vocab_size:,}: "
            "leave tokenizer out, so that the model's own is used"
        )
    return Texts(directory=directory, tokenizer=tokenizer, template=ChatTemplate.from_directory(directory))


def first_model(recipe: TrainRecipe) -> tuple[GlmForCausalLM, Weights | None]:
    """The model in fp32: a checkpoint's weights, quantised ones widened, or random ones from the recipe's seed.

    Of several processes each has the model on "meta" only, and the weights one after the other: it keeps its shards.
    """
    directory, is_alone = start_directory(recipe), num_ranks() == 1
    if directory is not None:
        if is_alone:
            model = load_model(directory, dtype=torch.float32, quant="none")
        else:
            opened = open_checkpoint(directory, quant="none")
            return opened.model, opened.tensors(torch.float32)
    else:
        with torch.device("cpu" if is_alone else "meta"):
            model = GlmForCausalLM(recipe.model)
        if not is_alone:
            return model, model.random_weights(recipe.seed)
        model.init_weights(recipe.seed)
    if recipe.data["kind"] == "rl" and options_of(recipe, recipe.phases[0]).algorithm == "ppo":
        model.add_module("value_head", ValueHead(recipe.model.hidden_size))
    return model, None


def without_critic(model: GlmForCausalLM) -> None:
    """Drop what only training needs, in place."""
    if "value_head" in dict(model.named_children()):
        del model.value_head


def phase_batches(recipe: TrainRecipe, data_directory: Path) -> Callable[[int], Batch]:
    """batches(step) of a named recipe over all phases, each with its own length, size and order."""
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
            min_document=int(data.get("min_document", Mixture().min_document)),
            document_weight=float(data.get("document_weight", Mixture().document_weight)),
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


def row_batches(recipe: TrainRecipe, texts: Texts, *, cp: int = 1) -> Callable[[int], Batch]:
    """batches(step) of pre-training and fine-tuning: each phase has its own rows and its own order.

    cp: processes that share the tokens of a row, which divide evenly.
    """
    sources = [_rows(recipe, phase, index, texts, cp) for index, phase in enumerate(recipe.phases)]
    starts = list(accumulate((phase.num_steps for phase in recipe.phases), initial=0))

    def batches(step: int) -> Batch:
        phase = recipe.phase_at(step)
        index = next(index for index, other in enumerate(recipe.phases) if other is phase)
        return sources[index].batch(step - starts[index], phase.batch_size)

    return batches


def _rows(recipe: TrainRecipe, phase: Phase, index: int, texts: Texts, cp: int) -> Rows:
    options, seed = options_of(recipe, phase), recipe.seed + index
    if isinstance(options, PretrainOptions):
        return open_rows(options.sources.split("\n"), texts.tokenizer, length=phase.sequence_length, seed=seed)
    assert isinstance(options, SftOptions)
    rows = ChatRows.from_files(
        options, texts.tokenizer, texts.template, length=phase.sequence_length, seed=seed, divisor=cp
    )
    if rows.num_left_out:
        sys.stderr.write(
            f"{phase.name}: {rows.num_left_out:,} conversations are longer than {phase.sequence_length:,} tokens and "
            "left out\n"
        )
    return rows


def rollout_batches(
    recipe: TrainRecipe, texts: Texts, model: GlmForCausalLM, directory: Path
) -> tuple[Rollouts, StepLoss]:
    """batches(step) and step_loss of reinforcement learning, whose phases share all options."""
    options = options_of(recipe, recipe.phases[0])
    assert isinstance(options, RlOptions)
    tasks = read_tasks(options, texts.tokenizer, texts.template)
    rollouts = Rollouts(model, texts.tokenizer, tasks, recipe=recipe, options=options)
    return rollouts, RolloutLoss(directory, rollouts, recipe, options)
