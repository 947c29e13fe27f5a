"""The part of serving.py beside llama.cpp's own server: the same weights, the same prompts, each server alone.

Flash attention on and off with one client; with more, only the setting that answered sooner.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import llama_build
from serving_bench import Bench, Step, body
from serving_client import Load, Plan, drive
from serving_parts import weight
from serving_report import MILLISECONDS, OURS, latencies
from serving_servers import Server, llama_server, our_server

FLASH, PLAIN = "llama.cpp fa", "llama.cpp"
PREFILL_SPEED = 90  # tokens per second of `mid` at 8K, for the estimate of what is left
REPLY = 64
SAME_PROMPTS, SAME_PROMPT, SAME_REPLY = 8, 200, 8
LEAST_SAME = 0.75  # of first tokens; between BF16 and BF16 a few flip
SPARE_TOKENS = 64


def llama(bench: Bench) -> list[Step]:
    """Time to first token and throughput on long prompts."""
    if bench.run.model == "nano":
        bench.run.note("llama: not measured, llama.cpp takes no index heads of 32 dimensions; --model mid has 128")
        return []
    program = llama_build.ensure_server_built()
    gguf = llama_build.ensure_gguf(bench.served.directory, "BF16")
    bench.run.versions |= llama_build.describe()
    sizes = bench.sizes

    def started(name: str, num_clients: int, slot_tokens: int) -> AbstractContextManager[Server]:
        log = bench.log(name.replace(" ", "-"))
        if name == OURS:
            tokens = 2 * num_clients * slot_tokens + 8192
            return our_server(bench.served.name, log, name=name, threads=bench.threads, draft=0, cache_tokens=tokens)
        return llama_server(
            program,
            gguf,
            log,
            name=name,
            threads=bench.threads,
            slots=num_clients,
            slot_tokens=slot_tokens,
            flash_attention=name == FLASH,
        )

    def compare() -> None:
        """First tokens after the same short prompts."""
        prompts = [bench.prompt(SAME_PROMPT) for _ in range(SAME_PROMPTS)]
        found = []
        for name in (OURS, FLASH):
            with started(name, 1, SAME_PROMPT + SPARE_TOKENS) as server:
                requests = [request(name, prompt, SAME_REPLY) for prompt in prompts]
                load = drive(Plan(port=server.wait().port, clients=[requests], keeps_text=True, reconnects=True))
            found.append([answer.text.split() for answer in load.answers])
        first, all_same = agreement(*found)
        bench.run.note(
            f"greedy answers of {OURS} and llama.cpp to {SAME_PROMPTS} prompts of {SAME_PROMPT} tokens: "
            f"{first:.0%} begin with the same token, {all_same:.0%} have the same {SAME_REPLY} tokens"
            + ("" if first >= LEAST_SAME else " - NOT THE SAME MODEL: these speeds cannot be compared")
        )

    def measure(num_clients: int, name: str) -> None:
        if num_clients > 1 and name in (FLASH, PLAIN) and name != better(bench):
            return
        prompts = [bench.prompt(sizes.llama_prompt) for _ in range(num_clients)]
        with started(name, num_clients, sizes.llama_prompt + REPLY + SPARE_TOKENS) as server:
            server.wait()
            drive(Plan(port=server.port, clients=[[request(name, bench.prompt(64), 2)]]))
            found, about = bench.drive(server, [[request(name, prompt, REPLY)] for prompt in prompts])
        bench.run.add("llama", name, num_clients, figures(found) | about)

    steps = [Step(name="the same greedy answers?", weight=20, run=compare)]
    for num_clients in sizes.llama_clients:
        num_read = num_clients * sizes.llama_prompt
        for name in (OURS, FLASH, PLAIN):
            expected = weight(num_read, 64) if name == OURS else num_read / PREFILL_SPEED
            is_spared = num_clients > 1 and name == PLAIN  # one of the two is
            steps.append(
                Step(
                    name=f"{name}, {num_clients} clients with {sizes.llama_prompt:,} tokens",
                    weight=5 + (0 if is_spared else expected),
                    run=partial(measure, num_clients, name),
                )
            )
    return steps


def request(name: str, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """The same for both, and what llama.cpp must be told to do the same."""
    more = {} if name == OURS else {"cache_prompt": False, "ignore_eos": True}
    return body(prompt, max_tokens, **more)


def figures(found: Load) -> dict[str, float]:
    read = sum(answer.num_prompt_tokens for answer in found.answers)
    figures = {
        "tokens/s": found.num_tokens / found.seconds,
        "read and drawn/s": (read + found.num_tokens) / found.seconds,
    }
    figures |= latencies(found.first_seconds, found.gaps)
    return figures | {"seconds": found.seconds, "first of all ms": MILLISECONDS * min(found.first_seconds)}


def better(bench: Bench) -> str:
    """llama.cpp's setting that gave one client its first token sooner."""
    flash, plain = (bench.run.median("llama", name, 1, "TTFT p50 ms") for name in (FLASH, PLAIN))
    return PLAIN if flash is None or (plain is not None and plain < flash) else FLASH


def agreement(own: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Shares of answers (words, one for each token) that begin alike, and that are alike."""
    pairs = list(zip(own, others, strict=True))
    return (
        sum(first[:1] == second[:1] and bool(first) for first, second in pairs) / len(pairs),
        sum(first == second for first, second in pairs) / len(pairs),
    )
