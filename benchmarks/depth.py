"""How much slower a model gets with a long context, and how much of a token's time is not spent in the kernels.

    python benchmarks/depth.py mid --depths 2048,32768,65536
    python benchmarks/depth.py nano --depths 2048,65536,131072

A model is a directory, `nano`, or `mid` or `tiny` with seeded random weights. The context is not read: its cache rows
are drawn from those of tokens that are (sharing.py). All depths are timed in turn; the medians count.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import torch
from rich.console import Console
from rich.table import Table
from sharing import PROMPT_TOKENS, fill, prefill, timed

import indexshare
from indexshare.engine.llm import LLM
from indexshare.engine.session import Session
from indexshare.kernels.cache_formats import CacheFormats
from indexshare.model.glm import GlmForCausalLM, assign_weights
from indexshare.model.native import pack_model

DECODE_TOKENS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second at a depth, and the share of a decode step outside the kernels: Python and torch."""

    depth: int
    prefill: float
    decode: float
    overhead: float


class Stopwatch:
    """Stands for the kernels' operators and counts the seconds spent in a step."""

    def __init__(self, operators: Any) -> None:
        self._operators = operators
        self.seconds = 0.0

    def run_model(self, *arguments: Any) -> int:
        begun = time.perf_counter()
        result: int = self._operators.run_model(*arguments)
        self.seconds += time.perf_counter() - begun
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, nano, mid or tiny")
    parser.add_argument("--depths", type=numbers, default="2048,32768,65536", help="tokens of context")
    parser.add_argument("--repeats", type=positive, default=5, help="of each figure, the depths in turn")
    parser.add_argument("--index-cache", choices=("int8",), help="as in `indexshare generate`")
    parser.add_argument("--latent-cache", choices=("int8",), help="as in `indexshare generate`")
    parser.add_argument("--json", type=Path, help="write the figures")
    options = parser.parse_args()
    llm = load(options.model, CacheFormats(latents=options.latent_cache, index_keys=options.index_cache))
    depths = options.depths
    speeds = measure(llm, depths, options.repeats)
    table = Table(
        "context", "prefill, tokens/s", "of the first", "decode, tokens/s", "of the first", "step outside the kernels"
    )
    for speed in speeds:
        of_first = (f"{speed.prefill / speeds[0].prefill:.0%}", f"{speed.decode / speeds[0].decode:.0%}")
        rates = (f"{speed.prefill:,.0f}", of_first[0], f"{speed.decode:,.1f}", of_first[1])
        table.add_row(f"{speed.depth:,}", *rates, f"{speed.overhead:.0%}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(speed) for speed in speeds], indent=1) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """A number that argparse refuses when it is not above zero."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def numbers(text: str) -> list[int]:
    """Positive numbers with commas between them."""
    return [positive(number) for number in text.split(",")]


def load(model: str, caches: CacheFormats) -> LLM:
    """A model from files, or a recipe with seeded random weights in BF16."""
    if model not in checkpoints.RECIPES:
        return indexshare.load(model, device="cpu", latent_cache=caches.latents, index_cache=caches.index_keys)
    with torch.device("meta"):
        weights = GlmForCausalLM(replace(checkpoints.RECIPES[model](), dtype="bfloat16"))
    assign_weights(weights, checkpoints.draw_weights(weights))
    pack_model(weights)
    return LLM(weights, caches=caches)


def measure(llm: LLM, depths: list[int], repeats: int) -> list[Speed]:
    """Prefill and decode at every depth, all depths in turn."""
    packed = llm.model.stack.packed
    if packed is None:
        raise SystemExit("the C++ kernels do not run here: `indexshare kernels` says why")
    watch = Stopwatch(packed.operators)
    llm.model.stack.packed = replace(packed, operators=watch)
    found: dict[tuple[str, int], list[float]] = {}

    def note(name: str, depth: int, session: Session, work: Callable[[Session], object]) -> None:
        found.setdefault((name, depth), []).append(timed(session, work))

    with llm.open_session(max(depths) + PROMPT_TOKENS) as session:
        fill(session, max(depths), llm.config.vocab_size)
        for _ in range(repeats + 1):  # the first round warms up
            for depth in depths:
                whole = session._token_ids
                session._token_ids = whole[:depth]  # the rows beyond stay for the next round
                note("prefill", depth, session, prefill)
                watch.seconds = 0.0
                note("decode", depth, session, decode)
                found.setdefault(("kernels", depth), []).append(watch.seconds)
                session._token_ids = whole
    medians = {key: statistics.median(values[1:]) for key, values in found.items()}
    return [
        Speed(
            depth=depth,
            prefill=PROMPT_TOKENS / medians["prefill", depth],
            decode=DECODE_TOKENS / medians["decode", depth],
            overhead=1.0 - medians["kernels", depth] / medians["decode", depth],
        )
        for depth in depths
    ]


def decode(session: Session) -> None:
    for _ in range(DECODE_TOKENS):
        session.decode(7)


if __name__ == "__main__":
    main()
