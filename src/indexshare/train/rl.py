"""Reinforcement learning on tasks that a program can judge, with our own engine as the sampler.

It is the training loop with other batches: `batches(step)` samples completions from the weights as they are at that
step and rewards them, and the loss is `rl_losses.rl_loss`. Every draw has a seed of its own that follows from the
recipe's seed, the step and its place, and the engine's tokens do not depend on what else is being served; so a run that
was killed and resumed samples the same completions and has the same losses. One update is made of each batch: the
policy that is trained is the one that sampled. The trainer learns exactly the token ids that were drawn; no text is
tokenised again.

The sampler is a second module over the trainer's own tensors (on a CPU its matrices are packed copies) with a new
engine at each step: it cannot hold an outdated weight or cached prefix, and nothing is restarted. It draws from the
model's own distribution: temperature 1, no filters, else the log-probabilities were not those of the policy. They
differ from the trainer's by rounding, because the kernels sum in another order and read cached latents, and where a key
at the border of the top-k changes sides; both differences are logged at each step, and a large mean is an error.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from indexshare.chat.template import ChatTemplate, encode_chat
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.files import is_json_lines, read_json_lines, source_files
from indexshare.engine.engine import Engine, EngineOptions
from indexshare.engine.llm import LLM
from indexshare.engine.sampler import SampledToken, SamplingParams
from indexshare.engine.scheduler import Limits
from indexshare.engine.sequence import Generation, Output
from indexshare.errors import RequestError, TrainingError
from indexshare.kernels import native
from indexshare.model.glm import GlmForCausalLM, assign_weights, weights_of
from indexshare.model.native import pack_model
from indexshare.train.monitor import keep_log_until
from indexshare.train.phases import Count, NotNegative, Phase, Share, TrainRecipe
from indexshare.train.rewards import Reward, reward_named
from indexshare.train.rl_losses import RlLosses, RolloutBatch, rl_loss

# Mean |difference| of log-probabilities between trainer and sampler, nats; more is a wrong weight, not rounding.
AGREEMENT = {"fp32": 1e-3, "bf16": 0.1}
LOG = "rollouts.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class RlOptions:
    """sources: files of tasks. reward: a name in `rewards.REWARDS`. A step has batch_size tasks, group_size draws each.

    clip_low, clip_high: how far the ratio of trainer to sampler may leave 1. enable_thinking: the template's variable.
    gae_lambda and value_weight are PPO's.
    """

    sources: str
    reward: str
    algorithm: Literal["grpo", "ppo"] = "grpo"
    group_size: Count = 8
    max_new_tokens: Count = 256
    enable_thinking: bool = False
    clip_low: Share = 0.2
    clip_high: NotNegative = 0.28
    gae_lambda: Share = 0.95
    value_weight: NotNegative = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt as text (of a conversation the last message) and as the model reads it, and what the reward reads."""

    prompt: str
    token_ids: tuple[int, ...]
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A completion: the drawn tokens with their log-probabilities, its text, and what it is worth."""

    task: Task
    tokens: tuple[SampledToken, ...]
    text: str
    reward: float


def read_tasks(options: RlOptions, tokenizer: Tokenizer, template: ChatTemplate) -> list[Task]:
    """Tasks of JSON lines: `messages` (and `tools`) for a chat or `prompt` for a plain text, and the reward's fields.

    Raises TrainingError, naming file and line.
    """
    tasks: list[Task] = []
    for source in options.sources.split("\n"):
        for file in filter(is_json_lines, source_files(source)):
            for number, value in read_json_lines(file):
                try:
                    tasks.append(_task(value, options, tokenizer, template))
                except (RequestError, TrainingError) as error:
                    raise TrainingError(f"{file}:{number}: {error}") from error
    if not tasks:
        raise TrainingError(f"no tasks in {options.sources}: give JSON lines with a prompt or messages")
    return tasks


def _task(value: object, options: RlOptions, tokenizer: Tokenizer, template: ChatTemplate) -> Task:
    fields = value if isinstance(value, Mapping) else {}
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if isinstance(prompt, str) and messages is None:
        return Task(prompt=prompt, token_ids=tuple(tokenizer.encode(prompt)), fields=fields)
    if prompt is not None or not isinstance(messages, list) or not messages:
        raise TrainingError('a task is an object with a text "prompt" or a list "messages"')
    token_ids = encode_chat(
        tokenizer, template, messages, tools=fields.get("tools"), enable_thinking=options.enable_thinking
    )
    return Task(prompt=str(messages[-1].get("content")), token_ids=tuple(token_ids), fields=fields)


def sampling_view(model: GlmForCausalLM, dtype: torch.dtype) -> GlmForCausalLM:
    """A module for sampling with the weights that `model` has now: shared where dtype and device allow.

    What the trainer adds (a value head) is left out. Router biases stay fp32.
    """
    with torch.device("meta"):
        view = GlmForCausalLM(model.config)
    names = weights_of(view).keys()
    shared = {name: weight for name, weight in model.state_dict().items() if name in names}
    for name, weight in shared.items():
        if not name.endswith("e_score_correction_bias"):
            shared[name] = weight.to(dtype)
    assign_weights(view, shared)
    if next(view.parameters()).device.type == "cpu" and pack_model(view) is not None:
        native.enable()
    return view


def draw(llm: LLM, requests: Sequence[Generation]) -> list[tuple[SampledToken, ...]]:
    """The drawn tokens of each request, from a fresh engine. Raises TrainingError when a request fails."""
    drawn: dict[Generation, list[SampledToken]] = {request: [] for request in requests}

    def deliver(outputs: Sequence[Output]) -> None:
        for output in outputs:
            if output.ended in ("error", "cancelled"):
                raise TrainingError(f"sampling failed: {output.error}")
            drawn[output.generation] += output.tokens

    longest = max(len(request.prompt_ids) + request.params.max_new_tokens for request in requests)
    limits = Limits(max_sequences=len(requests), max_waiting=len(requests))
    engine = Engine(llm, EngineOptions(limits=limits, cache_tokens=longest * len(requests)), deliver=deliver)
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    engine.close()
    return [tuple(tokens) for tokens in drawn.values()]


class Rollouts:
    """batches(step) of the loop: samples from `model` as it is, and rewards."""

    def __init__(
        self,
        model: GlmForCausalLM,
        tokenizer: Tokenizer,
        tasks: Sequence[Task],
        *,
        recipe: TrainRecipe,
        options: RlOptions,
        reward: Reward | None = None,
    ) -> None:
        """reward: in place of the one that `options` names. Raises TrainingError for a prompt that leaves no room."""
        self._model, self._tokenizer, self._tasks = model, tokenizer, tasks
        self._recipe, self._options = recipe, options
        self._reward = reward or reward_named(options.reward)
        self._dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        longest, room = max(len(task.token_ids) for task in tasks), min(p.sequence_length for p in recipe.phases)
        if longest >= room:
            raise TrainingError(f"a prompt has {longest:,} tokens, sequence_length is {room:,}: raise it")
        self.rollouts: list[Rollout] = []  # of the last step
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the tasks, by epoch

    def __call__(self, step: int) -> RolloutBatch:
        """Sample the completions of a step and judge them."""
        phase, size = self._recipe.phase_at(step), self._options.group_size
        tasks = [self._task(step * phase.batch_size + index) for index in range(phase.batch_size)]
        llm = LLM(sampling_view(self._model, self._dtype), tokenizer=self._tokenizer)
        requests = [
            Generation(
                prompt_ids=task.token_ids,
                params=SamplingParams(
                    max_new_tokens=min(self._options.max_new_tokens, phase.sequence_length - len(task.token_ids)),
                    temperature=1.0,
                    logprobs=0,
                    seed=self._seed(step, index * size + place),
                ),
                stop_ids=llm.chat_stop_ids,
                drafts=False,
            )
            for index, task in enumerate(tasks)
            for place in range(size)
        ]
        drawn = draw(llm, requests)
        texts = [self._text(tokens, llm.chat_stop_ids) for tokens in drawn]
        each = [task for task in tasks for _ in range(size)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # rewards that run programs wait for them
            rewards = list(pool.map(lambda task, text: self._reward(task.prompt, text, task.fields), each, texts))
        self.rollouts = [
            Rollout(task=task, tokens=tokens, text=text, reward=reward)
            for task, tokens, text, reward in zip(each, drawn, texts, rewards, strict=True)
        ]
        device = next(self._model.parameters()).device
        return collate(step, self.rollouts, [place // size for place in range(len(each))], device)

    def _task(self, index: int) -> Task:
        epoch, place = divmod(index, len(self._tasks))
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self._recipe.seed, epoch])
            self._order = epoch, generator.permutation(len(self._tasks))
        return self._tasks[self._order[1][place]]

    def _seed(self, step: int, place: int) -> int:
        return int(np.random.SeedSequence([self._recipe.seed, step, place]).generate_state(1, np.uint64)[0] >> 1)

    def _text(self, tokens: Sequence[SampledToken], stop_ids: Sequence[int]) -> str:
        """What is judged: without the token that ended it and without the reasoning."""
        token_ids = [token.token_id for token in tokens]
        if token_ids[-1] in stop_ids:
            token_ids.pop()
        closing = self._tokenizer.control_ids.get("</think>")
        if closing in token_ids and self._options.enable_thinking:
            token_ids = token_ids[token_ids.index(closing) + 1 :]
        return self._tokenizer.decode(token_ids)


def collate(step: int, rollouts: Sequence[Rollout], groups: Sequence[int], device: torch.device) -> RolloutBatch:
    """Rollouts as one flat batch; the last drawn token is a target only."""
    token_ids: list[int] = []
    positions, predictors = [], []
    segments, completions = [0], [0]
    for rollout in rollouts:
        drawn = [token.token_id for token in rollout.tokens]
        own = [*rollout.task.token_ids, *drawn[:-1]]
        first = segments[-1] + len(rollout.task.token_ids) - 1
        predictors.append(torch.arange(first, first + len(drawn)))
        positions.append(torch.arange(len(own)))
        token_ids += own
        segments.append(len(token_ids))
        completions.append(completions[-1] + len(drawn))
    tokens = [token for rollout in rollouts for token in rollout.tokens]
    return RolloutBatch(
        step=step,
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.cat(positions).to(device),
        segment_starts=tuple(segments),
        predictors=torch.cat(predictors).to(device),
        targets=torch.tensor([token.token_id for token in tokens], device=device),
        sampled_logprobs=torch.tensor([token.logprob for token in tokens], dtype=torch.float32, device=device),
        completion_starts=tuple(completions),
        rewards=tuple(rollout.reward for rollout in rollouts),
        groups=tuple(groups),
    )


class RolloutLoss:
    """step_loss(model, batch, phase) of the loop; writes a line for each step to `directory`/rollouts.jsonl.

    Raises TrainingError when trainer and sampler do not agree.
    """

    def __init__(self, directory: Path, rollouts: Rollouts, recipe: TrainRecipe, options: RlOptions) -> None:
        self._path, self._rollouts, self._options = directory / LOG, rollouts, options
        self._bound = AGREEMENT[recipe.precision]
        self._next: int | None = None  # the step after the last line

    def __call__(self, model: nn.Module, batch: RolloutBatch, phase: Phase) -> RlLosses:
        assert isinstance(model, GlmForCausalLM)
        options = self._options
        losses = rl_loss(
            model,
            batch,
            phase,
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            gae_lambda=options.gae_lambda,
            value_weight=options.value_weight,
        )
        self._log(batch.step, losses.metrics)
        if (difference := losses.metrics["logprob_difference"]) > self._bound:
            raise TrainingError(
                f"trainer and sampler disagree about the drawn tokens by {difference:.2g} nats in the mean, more than "
                f"{self._bound:g}: run `indexshare doctor` on the model"
            )
        return losses

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step != self._next:  # the first step of this call, or one that is done again
            keep_log_until(self._path, step)
        self._next = step + 1
        figures = {name: float(f"{value:.4g}") for name, value in metrics.items()}
        shown = self._rollouts.rollouts[0]
        example = {"prompt": shown.task.prompt, "completion": shown.text, "reward": shown.reward}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step + 1, **figures, "example": example}, ensure_ascii=False) + "\n")
