"""What a recipe from a file trains on: its first weights, its batches and its loss."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from indexshare.chat.template import ChatTemplate
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import Batch, open_rows
from indexshare.engine.resolve import resolve_tokenizer
from indexshare.errors import ConfigError
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model
from indexshare.train.distributed import num_ranks
from indexshare.train.loop import Losses
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.recipes_file import PretrainOptions, options_of, start_directory
from indexshare.train.rl import RlOptions, RolloutLoss, Rollouts, read_tasks
from indexshare.train.rl_losses import ValueHead
from indexshare.train.sft import ChatRows, SftOptions

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


def first_model(recipe: TrainRecipe) -> GlmForCausalLM:
    """The model in fp32: a checkpoint's weights, quantised ones widened, or random ones from the recipe's seed."""
    if (directory := start_directory(recipe)) is not None:
        model = load_model(directory, dtype=torch.float32, quant="none")
    else:
        model = GlmForCausalLM(recipe.model)
        model.init_weights(recipe.seed)
    if recipe.data["kind"] == "rl" and options_of(recipe, recipe.phases[0]).algorithm == "ppo":
        model.add_module("value_head", ValueHead(recipe.model.hidden_size))
    return model


def without_critic(model: GlmForCausalLM) -> None:
    """Drop what only training needs, in place."""
    if "value_head" in dict(model.named_children()):
        del model.value_head


def row_batches(recipe: TrainRecipe, texts: Texts) -> Callable[[int], Batch]:
    """batches(step) of pre-training and fine-tuning: each phase has its own rows and its own order."""
    sources = [_rows(recipe, phase, index, texts) for index, phase in enumerate(recipe.phases)]
    starts = list(accumulate((phase.num_steps for phase in recipe.phases), initial=0))

    def batches(step: int) -> Batch:
        phase = recipe.phase_at(step)
        index = next(index for index, other in enumerate(recipe.phases) if other is phase)
        return sources[index].batch(step - starts[index], phase.batch_size)

    return batches


def _rows(recipe: TrainRecipe, phase: Phase, index: int, texts: Texts) -> Rows:
    options, seed = options_of(recipe, phase), recipe.seed + index
    if isinstance(options, PretrainOptions):
        return open_rows(options.sources.split("\n"), texts.tokenizer, length=phase.sequence_length, seed=seed)
    assert isinstance(options, SftOptions)
    rows = ChatRows.from_files(options, texts.tokenizer, texts.template, length=phase.sequence_length, seed=seed)
    if rows.num_left_out:
        sys.stderr.write(
            f"{phase.name}: {rows.num_left_out:,} conversations are longer than {phase.sequence_length:,} tokens and "
            "left out\n"
        )
    return rows


def rollout_batches(
    recipe: TrainRecipe, texts: Texts, model: GlmForCausalLM, directory: Path
) -> tuple[Rollouts, StepLoss]:
    """batches(step) and step_loss of reinforcement learning, with the options of the first phase."""
    if num_ranks() > 1:
        raise ConfigError(f"{recipe.name}: reinforcement learning runs in one process; start it without torchrun")
    options = options_of(recipe, recipe.phases[0])
    assert isinstance(options, RlOptions)
    tasks = read_tasks(options, texts.tokenizer, texts.template)
    rollouts = Rollouts(model, texts.tokenizer, tasks, recipe=recipe, options=options)
    return rollouts, RolloutLoss(directory, rollouts, recipe, options)
