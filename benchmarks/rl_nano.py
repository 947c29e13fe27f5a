"""Reinforcement learning on nano: a question it was not trained on, with a reward of at most 1. For docs/training.md.

    python benchmarks/rl_nano.py --output runs/rl            three seeds of GRPO, three of PPO
    python benchmarks/rl_nano.py --output runs/rl --algorithms grpo --seeds 0 --steps 20
    python benchmarks/rl_nano.py --output runs/rl --agreement      trainer against sampler, before any training

Each prompt holds one fact in the wording of nano's training data and asks for it backwards: "Whose access code is
amber?". The reply must state the fact, to the letter: reward 1, else 0. nano sometimes does; a model that has
understood the question always can. Before and after, the same 200 held-out prompts are answered, drawn and greedily.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from indexshare import runtime
from indexshare.chat.template import ChatTemplate, encode_chat
from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.llm import LLM, load
from indexshare.engine.reply import chat_prompt
from indexshare.engine.resolve import packaged_model
from indexshare.engine.sampler import SamplingParams
from indexshare.engine.sequence import Generation
from indexshare.kernels import registry
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.recipes import run
from indexshare.train.recipes_file import read_recipe
from indexshare.train.recipes_run import first_model
from indexshare.train.rl import RlOptions, Rollouts, Task, draw
from indexshare.train.rl_losses import rl_loss
from indexshare.train.words import FIRST_WORDS, SECOND_WORDS

NUM_HELD_OUT = 200
RECIPE = """
kind = "rl"
model = "nano"
seed = {seed}
learning_rate_muon = {rate}
learning_rate_adamw = {rate}
weight_decay = 0.0
warmup_steps = 5
min_lr_ratio = 0.1
log_every = 1
checkpoint_every = 1000

[data]
sources = ["tasks.jsonl"]
reward = "exact_match"
algorithm = "{algorithm}"
group_size = {group_size}
max_new_tokens = 20

[[phases]]
num_steps = {steps}
batch_size = {batch_size}
sequence_length = 96
"""


def make_tasks(seed: int, count: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    tasks: list[dict[str, object]] = []
    for _ in range(count):
        first, value = rng.choice(FIRST_WORDS, size=2, replace=False)
        fact = f"The access code of {first}-{rng.choice(SECOND_WORDS)} is {value}."
        message = {"role": "user", "content": f"# {fact}\n\nWhose access code is {value}?"}
        tasks.append({"messages": [message], "answer": fact})
    return tasks


def solved(llm: LLM, tasks: list[dict[str, object]], temperature: float) -> float:
    requests = []
    for index, task in enumerate(tasks):
        prompt = chat_prompt(llm.tokenizer, llm.template, task["messages"], enable_thinking=False)
        params = SamplingParams(max_new_tokens=20, temperature=temperature, seed=index)
        requests.append(
            Generation(prompt_ids=tuple(prompt.token_ids), params=params, stop_ids=llm.chat_stop_ids, drafts=False)
        )
    drawn = draw(llm, requests)
    texts = [
        llm.tokenizer.decode([token.token_id for token in tokens if token.token_id not in llm.chat_stop_ids])
        for tokens in drawn
    ]
    return float(np.mean([text == task["answer"] for text, task in zip(texts, tasks, strict=True)]))


def measure(directory: str | Path, tasks: list[dict[str, object]]) -> dict[str, float]:
    llm = load(directory, dtype="float32")
    return {"drawn": solved(llm, tasks, 1.0), "greedy": solved(llm, tasks, 0.0)}


def agreement(tasks: list[dict[str, object]]) -> None:
    """Trainer against sampler over 64 completions, behind short prompts and behind 1,500 tokens of text, so that keys
    are chosen (nano's top-k is 256)."""
    filler = (packaged_model() / "README.md").read_text()
    model = first_model(read_recipe(Path(__file__).parents[1] / "examples" / "recipes" / "rl.toml"))
    tokenizer, template = Tokenizer.from_directory(packaged_model()), ChatTemplate()
    options = RlOptions(sources="", reward="exact_match", max_new_tokens=20)
    for length in (0, 3500):
        chosen = []
        for task in tasks[:8]:
            message = task["messages"][0]
            ids = encode_chat(
                tokenizer,
                template,
                [{**message, "content": filler[:length] + message["content"]}],
                enable_thinking=False,
            )
            chosen.append(Task(prompt="", token_ids=tuple(ids), fields=task))
        for precision in ("fp32", "bf16") if length == 0 else ("fp32",):  # BF16 without its kernels takes minutes
            phase = Phase(
                name="rl", num_steps=1, attention="sparse", trains="model", sequence_length=2048, batch_size=8
            )
            recipe = TrainRecipe(
                name="rl",
                model=model.config,
                phases=(phase,),
                seed=0,
                learning_rate_muon=0.0,
                learning_rate_adamw=0.0,
                warmup_steps=0,
                precision=precision,
            )
            batch = Rollouts(model, tokenizer, chosen, recipe=recipe, options=options)(0)
            is_bf16 = precision == "bf16"
            with torch.no_grad(), registry.specifications(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                losses = rl_loss(model, batch, phase, clip_low=0.2, clip_high=0.28, gae_lambda=1.0, value_weight=0.0)
            figures = {
                name: losses.metrics[name] for name in ("logprob_difference", "logprob_difference_max", "clipped")
            }
            tokens = len(chosen[0].token_ids)
            print(json.dumps({"prompt_tokens": tokens, "precision": precision, **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "ppo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--agreement", action="store_true")
    arguments = parser.parse_args()
    runtime.set_threads(None)
    arguments.output.mkdir(parents=True, exist_ok=True)
    held_out = make_tasks(1, NUM_HELD_OUT)
    if arguments.agreement:
        agreement(held_out)
        return
    with (arguments.output / "tasks.jsonl").open("w") as file:
        file.writelines(json.dumps(task) + "\n" for task in make_tasks(0, 1000))
    print("before", measure("nano", held_out))
    for algorithm in arguments.algorithms:
        for seed in arguments.seeds:
            path = arguments.output / f"{algorithm}-{seed}.toml"
            # as many completions a step: a group needs several, a critic none to compare with
            size = {"group_size": 8, "batch_size": 8} if algorithm == "grpo" else {"group_size": 1, "batch_size": 64}
            recipe = RECIPE.format(seed=seed, algorithm=algorithm, rate=arguments.rate, steps=arguments.steps, **size)
            path.write_text(recipe)
            directory = arguments.output / f"{algorithm}-{seed}"
            began, processor = time.monotonic(), time.process_time()
            torch.manual_seed(0)
            run(read_recipe(path), directory, progress=False)
            lines = [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
            rewards = [line["reward"] for line in lines]
            print(
                json.dumps(
                    {
                        "algorithm": algorithm,
                        "seed": seed,
                        "reward_by_tenth": [round(float(np.mean(part)), 3) for part in np.array_split(rewards, 10)],
                        **measure(directory / "model", held_out),
                        "logprob_difference": max(line["logprob_difference"] for line in lines),
                        "logprob_difference_max": max(line["logprob_difference_max"] for line in lines),
                        "clipped": max(line["clipped"] for line in lines),
                        "seconds": round(time.monotonic() - began),
                        "processor_seconds": round(time.process_time() - processor),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
