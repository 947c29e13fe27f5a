"""Reinforcement learning: losses against formulas, sampler against trainer, runs that learn, stop and go on."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from indexshare.chat.template import ChatTemplate
from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.llm import LLM
from indexshare.engine.resolve import packaged_model
from indexshare.engine.sampler import SampledToken
from indexshare.errors import ConfigError, TrainingError
from indexshare.kernels import registry
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import ForwardBatch
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.recipes import tiny
from indexshare.model.weights import load_model
from indexshare.train.checkpoint import list_checkpoints
from indexshare.train.loop import train
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.recipes import run
from indexshare.train.recipes_file import read_recipe
from indexshare.train.rl import (
    AGREEMENT,
    RlOptions,
    Rollout,
    RolloutLoss,
    Rollouts,
    Task,
    collate,
    read_tasks,
    sampling_view,
)
from indexshare.train.rl_losses import ValueHead, group_advantages, policy_loss, rl_loss, token_advantages

TOKENIZER = Tokenizer.from_directory(packaged_model())
CPU = torch.device("cpu")
OPTIONS = RlOptions(sources="", reward="exact_match", group_size=4, max_new_tokens=6)
LOSS = {"clip_low": 0.2, "clip_high": 0.28, "gae_lambda": 0.95, "value_weight": 0.5}


def share_of_a(prompt: str, completion: str, task: Any) -> float:
    """At most 1; of no use to a model that does not know what is wanted."""
    return completion.count("a") / max(1, len(completion))


def recipe(num_steps: int = 3, **changes: Any) -> TrainRecipe:
    phase = Phase(name="rl", num_steps=num_steps, attention="sparse", trains="model", sequence_length=40, batch_size=2)
    values = {
        "name": "rl",
        "model": tiny(vocab_size=4096, eos_token_id=list(TOKENIZER.stop_ids)),
        "phases": (phase,),
        "seed": 3,
        "learning_rate_muon": 3e-3,
        "learning_rate_adamw": 3e-3,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "checkpoint_every": 1,
        "log_every": 1,
    }
    return TrainRecipe(**{**values, **changes})


def fresh_model(seed: int = 0) -> GlmForCausalLM:
    model = GlmForCausalLM(recipe().model)
    model.init_weights(seed)
    return model


def tasks() -> list[Task]:
    """Prompts longer than the model's top-k of 8, so that keys are chosen."""
    prompts = ("Which words do you know by heart today?", "Write letters and nothing else, please, thank you!")
    return [Task(prompt=prompt, token_ids=tuple(TOKENIZER.encode(prompt)), fields={}) for prompt in prompts]


def rollouts(model: GlmForCausalLM, chosen: TrainRecipe | None = None) -> Rollouts:
    return Rollouts(model, TOKENIZER, tasks(), recipe=chosen or recipe(), options=OPTIONS, reward=share_of_a)


def train_tiny(directory: Path, model: GlmForCausalLM, chosen: TrainRecipe, **options: Any) -> list[dict[str, Any]]:
    directory.mkdir(exist_ok=True)
    batches = rollouts(model, chosen)
    loss = RolloutLoss(directory, batches, chosen, OPTIONS)
    train(chosen, directory, model=model, batches=batches, step_loss=loss, progress=False, **options)
    return [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]


def model_of_few_letters() -> GlmForCausalLM:
    """Writes a, b, c and d at random: a start from which the reward can be found."""
    model = fresh_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    letters = torch.tensor([TOKENIZER.encode(letter)[0] for letter in "abcd"])
    for _ in range(25):
        chosen = letters[torch.randint(4, (8, 6))].tolist()
        drawn = [tuple(SampledToken(token_id=token, logprob=0.0) for token in tokens) for tokens in chosen]
        each = [Rollout(task=tasks()[i % 2], tokens=tokens, text="", reward=0.0) for i, tokens in enumerate(drawn)]
        batch = collate(0, each, range(8), CPU)
        layout = KeyLayout.packed(batch.segment_starts)
        hidden = model(ForwardBatch(token_ids=batch.token_ids, positions=batch.positions, layout=layout))
        optimizer.zero_grad()
        cross_entropy(model.logits(hidden[batch.predictors]), batch.targets).backward()
        optimizer.step()
    return model


# -------------------------------------------------------------------------------------------------------------- losses


def test_advantage_of_a_group_is_a_standard_score() -> None:
    rewards = (1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 3.0)
    advantages = group_advantages(rewards, (0, 0, 0, 0, 1, 1, 2))
    assert advantages.tolist() == pytest.approx([1, -1, -1, 1, 0, 0, 0], abs=1e-4)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_advantages_of_tokens_are_the_sum_of_discounted_surprises(gae_lambda: float) -> None:
    starts, rewards = (0, 3, 4, 9), (1.0, -0.5, 0.25)
    values = torch.randn(9)
    result = token_advantages(values, rewards, starts, gae_lambda)
    for reward, start, stop in zip(rewards, starts, starts[1:], strict=False):
        own = [*values[start:stop].tolist(), 0.0]
        surprises = [own[i + 1] - own[i] + (reward if i + 1 == stop - start else 0.0) for i in range(stop - start)]
        for place in range(stop - start):
            wanted = sum(gae_lambda ** (i - place) * surprises[i] for i in range(place, stop - start))
            assert float(result[start + place]) == pytest.approx(wanted, abs=1e-5)


def test_a_token_outside_the_bounds_takes_no_part_whatever_its_advantage() -> None:
    sampled = torch.zeros(6)
    ratios = torch.tensor([1.0, 0.79, 1.29, 0.81, 1.27, math.exp(50)])
    for sign in (1.0, -1.0):
        logprobs = ratios.log().requires_grad_()
        advantages = sign * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        loss, clipped = policy_loss(logprobs, sampled, advantages, clip_low=0.2, clip_high=0.28)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert clipped.tolist() == [False, True, True, False, False, True]
        wanted = -(ratios * advantages / 6).masked_fill(clipped, 0.0)  # d ratio / d logprob = ratio
        assert torch.allclose(gradient, wanted, rtol=1e-5)
        assert float(loss.detach()) == pytest.approx(float(wanted.sum()), rel=1e-5)


def test_the_gradient_of_fresh_samples_is_that_of_the_policy_gradient() -> None:
    """REINFORCE with the group's baseline, written out with log-probabilities of each completion by itself."""
    model = fresh_model()
    batches = rollouts(model)
    batch = batches(0)
    rl_loss(model, batch, recipe().phases[0], **LOSS).total.backward()
    found = model.lm_head.weight.grad
    model.zero_grad()
    advantages = group_advantages(batch.rewards, batch.groups)
    total = torch.zeros(())
    for rollout, advantage in zip(batches.rollouts, advantages, strict=True):
        single = collate(0, [rollout], [0], CPU)
        logprob = -rl_loss(model, single, recipe().phases[0], **LOSS).lm * single.completion_starts[-1]
        assert not logprob.requires_grad
        total = total - advantage * logprobs_of(model, rollout).sum()
    (total / len(batch.targets)).backward()
    assert found is not None and model.lm_head.weight.grad is not None and found.abs().max() > 1e-5
    assert torch.allclose(found, model.lm_head.weight.grad, atol=1e-6)


def logprobs_of(model: GlmForCausalLM, rollout: Rollout) -> Tensor:
    """With gradient, of one completion, from logits of the whole sequence."""
    ids = torch.tensor([*rollout.task.token_ids, *(token.token_id for token in rollout.tokens)])
    batch = ForwardBatch(
        token_ids=ids, positions=torch.arange(len(ids)), layout=KeyLayout.packed((0, len(ids))), attention="sparse"
    )
    scores = model.logits(model(batch)).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    return scores[len(rollout.task.token_ids) - 1 :]


def test_the_critic_learns_without_moving_the_policy() -> None:
    model = fresh_model()
    batch = rollouts(model)(0)
    model.add_module("value_head", ValueHead(model.config.hidden_size))
    phase = recipe().phases[0]
    first = rl_loss(model, batch, phase, **{**LOSS, "value_weight": 1.0})
    assert first.metrics["value_loss"] == pytest.approx(
        np.average(np.square(batch.rewards), weights=np.diff(batch.completion_starts)), rel=1e-4
    ), "a fresh critic says 0"
    # equal rewards, equal values, no discount: no token is better than another, so only the critic has a gradient
    equal = replace(batch, rewards=(0.5,) * 8)
    rl_loss(model, equal, phase, **{**LOSS, "gae_lambda": 1.0}).total.backward()
    head, trunk = model.get_parameter("value_head.weight").grad, model.lm_head.weight.grad
    assert head is not None and head.abs().sum() > 0
    assert trunk is not None and trunk.abs().max() == 0
    optimizer = torch.optim.Adam([model.get_parameter(f"value_head.{name}") for name in ("weight", "bias")], lr=3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        losses = rl_loss(model, equal, phase, **LOSS)
        losses.total.backward()
        optimizer.step()
    assert losses.metrics["value_loss"] < 0.1


# ------------------------------------------------------------------------------------------------------------ sampling


def test_sampler_and_trainer_agree_and_learn_the_drawn_tokens() -> None:
    model = fresh_model()
    batches = rollouts(model)
    batch = batches(5)
    drawn = [token.token_id for rollout in batches.rollouts for token in rollout.tokens]
    assert batch.targets.tolist() == drawn
    for rollout, start, stop in zip(batches.rollouts, batch.segment_starts, batch.segment_starts[1:], strict=False):
        ids = [token.token_id for token in rollout.tokens]
        assert batch.token_ids[start:stop].tolist() == [*rollout.task.token_ids, *ids[:-1]]
    assert any(
        TOKENIZER.encode(rollout.text) != [token.token_id for token in rollout.tokens] for rollout in batches.rollouts
    ), "random tokens: their text would be tokenised otherwise, and is not"
    with registry.specifications():
        losses = rl_loss(model, batch, recipe().phases[0], **LOSS)
    assert losses.metrics["logprob_difference_max"] < 1e-4
    llm = LLM(sampling_view(model, torch.float32), tokenizer=TOKENIZER)  # a third way: one session, one sequence
    rollout = batches.rollouts[0]
    ids = [*rollout.task.token_ids, *(token.token_id for token in rollout.tokens)]
    scores = llm.logprobs(ids)[len(rollout.task.token_ids) - 1 :]
    assert scores.tolist() == pytest.approx([token.logprob for token in rollout.tokens], abs=1e-4)


def test_draws_follow_the_step_and_the_weights() -> None:
    model = fresh_model()
    batches = rollouts(model)
    first, again, other = batches(0), batches(0), batches(1)
    assert first.targets.tolist() == again.targets.tolist() != other.targets.tolist()
    assert first.sampled_logprobs.tolist() == again.sampled_logprobs.tolist()
    own = [
        first.targets[a:b].tolist() for a, b in zip(first.completion_starts, first.completion_starts[1:], strict=False)
    ]
    assert len({tuple(tokens) for tokens in own}) > 4, "each completion has a seed of its own"
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.encode("a")[0]] = 0.0
        model.lm_head.weight.mul_(0.0)
    assert batches(0).sampled_logprobs.tolist() == pytest.approx([-math.log(4096)] * len(batches(0).targets), rel=1e-4)


def test_sampling_leaves_the_trainer_as_it_is() -> None:
    model = fresh_model()
    model.add_module("value_head", ValueHead(model.config.hidden_size))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    rollouts(model)(0)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    view = sampling_view(model, torch.float32)
    assert view.model.norm.weight.data_ptr() == model.model.norm.weight.data_ptr(), "shared, not copied"


def test_what_is_judged_has_no_stop_token_and_no_reasoning() -> None:
    model = fresh_model()
    thinking = Rollouts(
        model, TOKENIZER, tasks(), recipe=recipe(), options=replace(OPTIONS, enable_thinking=True), reward=share_of_a
    )
    ids = TOKENIZER.encode("I think.</think>So be it.<|user|>", allow_control=True)
    tokens = [SampledToken(token_id=token) for token in ids]
    assert thinking._text(tokens, TOKENIZER.stop_ids) == "So be it."
    assert rollouts(model)._text(tokens, TOKENIZER.stop_ids) == "I think.</think>So be it."


def test_a_request_that_fails_ends_the_run() -> None:
    model = fresh_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"sampling failed: .*not finite"):
        rollouts(model)(0)


def test_tasks_are_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    options = replace(OPTIONS, sources=str(file))
    file.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n\n{"messages": [{"role": "user", "content": "Hi"}]}\n')
    plain, chat = read_tasks(options, TOKENIZER, ChatTemplate())
    assert plain.token_ids == tuple(TOKENIZER.encode("1 + 1 =")) and plain.fields["answer"] == "2"
    assert TOKENIZER.decode(chat.token_ids) == "[gMASK]<sop><|user|>Hi<|assistant|><think></think>"
    assert chat.prompt == "Hi"
    for line in ('{"answer": "2"}', "3", '{"prompt": "a", "messages": []}', '{"messages": [{"role": "cat"}]}', "{"):
        file.write_text('{"prompt": "fine"}\n' + line + "\n")
        with pytest.raises(TrainingError, match=r"tasks\.jsonl:2"):
            read_tasks(options, TOKENIZER, ChatTemplate())
    file.write_text("\n")
    with pytest.raises(TrainingError, match="no tasks"):
        read_tasks(options, TOKENIZER, ChatTemplate())
    short = recipe(phases=(replace(recipe().phases[0], sequence_length=4),))
    with pytest.raises(TrainingError, match="sequence_length is 4"):
        rollouts(fresh_model(), short)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_the_reward_rises_and_what_is_frozen_stays(tmp_path: Path) -> None:
    model = model_of_few_letters()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    chosen = recipe(12, checkpoint_every=100, learning_rate_muon=6e-3, learning_rate_adamw=6e-3)
    lines = train_tiny(tmp_path / "run", model, chosen)
    rewards = [line["reward"] for line in lines]
    assert rewards[0] < 0.5 and np.mean(rewards[-3:]) > 0.75
    assert max(line["logprob_difference"] for line in lines) < AGREEMENT["fp32"]
    frozen = (".indexer.", f"layers.{model.config.num_hidden_layers}.", "e_score_correction_bias")
    for name, parameter in model.named_parameters():
        is_frozen = any(part in name for part in frozen)
        assert torch.equal(parameter, before[name]) == is_frozen, name


@pytest.mark.parametrize("with_critic", [False, True])
def test_a_run_that_was_stopped_draws_and_learns_the_same(tmp_path: Path, with_critic: bool) -> None:
    def model() -> GlmForCausalLM:
        fresh = fresh_model()
        if with_critic:
            fresh.add_module("value_head", ValueHead(fresh.config.hidden_size))
        return fresh

    whole = train_tiny(tmp_path / "whole", model(), recipe(4))
    train_tiny(tmp_path / "parts", model(), recipe(4), max_steps=2)
    with (tmp_path / "parts" / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 9.0}\n{"step": 4, "rew')  # a killed run was further than its checkpoint
    assert train_tiny(tmp_path / "parts", model(), recipe(4)) == whole
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    ends = [list_checkpoints(tmp_path / name / "checkpoints")[-1] / "model.safetensors" for name in ("whole", "parts")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_sampler_with_other_weights_is_an_error(tmp_path: Path) -> None:
    model = fresh_model()
    batches = rollouts(fresh_model(seed=1))
    with pytest.raises(TrainingError, match=r"trainer and sampler disagree .* run `indexshare doctor`"):
        train(
            recipe(),
            tmp_path,
            model=model,
            batches=batches,
            step_loss=RolloutLoss(tmp_path, batches, recipe(), OPTIONS),
            progress=False,
        )


def test_ppo_from_a_file_exports_a_model_without_its_critic(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "How many letters are in a word?", "answer": "some"}\n')
    (tmp_path / "ppo.toml").write_text(
        """
kind = "rl"
model = "tiny"
tokenizer = "nano"
config = { vocab_size = 4096 }
learning_rate_muon = 1e-3
learning_rate_adamw = 1e-3
[data]
sources = ["tasks.jsonl"]
reward = "exact_match"
algorithm = "ppo"
group_size = 1
max_new_tokens = 4
[[phases]]
num_steps = 2
batch_size = 2
sequence_length = 32
"""
    )
    chosen = read_recipe(tmp_path / "ppo.toml")
    assert chosen.phases[0].trains == "model"
    _, result = run(chosen, tmp_path / "run", progress=False)
    assert result.stopped == "finished"
    assert load_model(tmp_path / "run" / "model").config.vocab_size == 4096
    text = (tmp_path / "ppo.toml").read_text()
    (tmp_path / "ppo.toml").write_text(text.replace('"exact_match"', '"charm"'))
    with pytest.raises(ConfigError, match="no reward 'charm'"):
        run(read_recipe(tmp_path / "ppo.toml"), tmp_path / "other", progress=False)
