"""What IndexShare saves: one model with its indexers in a quarter of the layers, and with one in every layer.

    python benchmarks/sharing.py --depths 65536,131072

The context is not read: its cache rows are drawn from those of tokens that are, since time does not depend on what they
say. Then a prompt and single tokens are timed at that depth, both variants in turn. Beside the ratios stands what
counting predicts (FLOP for prefill, bytes for a token), and what was published for a 30-billion-parameter model on GPUs
at 200,000 tokens (IndexCache, arXiv 2603.12201): prefill 1.82, decode 1.48.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import checkpoints
import torch
from rich.console import Console
from rich.table import Table

from indexshare.engine.llm import LLM
from indexshare.engine.session import Session
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM, assign_weights, weights_of
from indexshare.model.inspect import activated_parameters, token_work
from indexshare.model.native import pack_model

PROMPT_TOKENS, DECODE_TOKENS, SEED_TOKENS = 512, 16, 2048
PUBLISHED = {"prefill": 1.82, "decode": 1.48}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Seconds with an indexer in every layer over seconds with IndexShare, and what counting predicts."""

    depth: int
    phase: str
    shared_seconds: tuple[float, ...]
    every_seconds: tuple[float, ...]
    measured: float
    predicted: float
    published: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mid", "tiny"), default="mid")
    parser.add_argument("--depths", default="65536,131072", help="tokens of context")
    parser.add_argument("--repeats", type=int, default=3, help="of each figure, both variants in turn")
    parser.add_argument("--json", type=Path, help="write every repeat")
    options = parser.parse_args()
    depths = [int(depth) for depth in options.depths.split(",")]
    shared, every = make_variants(options.model)
    ratios = [ratio for depth in depths for ratio in measure(shared, every, depth, options.repeats)]
    table = Table("context", "phase", "IndexShare", "in every layer", "measured", "predicted", "published")
    for ratio in ratios:
        times = (f"{statistics.median(each) * 1e3:,.1f} ms" for each in (ratio.shared_seconds, ratio.every_seconds))
        factors = (f"{each:.2f}x" for each in (ratio.measured, ratio.predicted, ratio.published))
        table.add_row(f"{ratio.depth:,}", ratio.phase, *times, *factors)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(ratio) for ratio in ratios], indent=1) + "\n", encoding="utf-8")


def make_variants(name: str) -> tuple[LLM, LLM]:
    """A seeded random model with IndexShare, and with an indexer in every layer; they share all weights they have."""
    config = replace(checkpoints.RECIPES[name](), dtype="bfloat16")
    everywhere = replace(config, indexer_types=("full",) * config.num_hidden_layers)
    with torch.device("meta"):
        every, shared = GlmForCausalLM(everywhere), GlmForCausalLM(config)
    assign_weights(every, checkpoints.draw_weights(every))
    pack_model(every)
    own = set(weights_of(shared))
    assign_weights(shared, {name: weight for name, weight in weights_of(every).items() if name in own})
    pack_model(shared)
    return LLM(shared), LLM(every)


def measure(shared: LLM, every: LLM, depth: int, repeats: int) -> list[Ratio]:
    """Prefill and decode at a depth, the two models in turn."""
    seconds: dict[tuple[str, LLM], list[float]] = {}
    with shared.open_session(depth + PROMPT_TOKENS) as first, every.open_session(depth + PROMPT_TOKENS) as second:
        for session in (first, second):
            fill(session, depth, shared.config.vocab_size)
        for _ in range(repeats + 1):  # the first round warms up
            for llm, session in ((shared, first), (every, second)):
                seconds.setdefault(("prefill", llm), []).append(timed(session, prefill))
                seconds.setdefault(("decode", llm), []).append(timed(session, decode) / DECODE_TOKENS)
    predicted = {"prefill": work_ratio(shared.config, depth), "decode": bytes_ratio(shared.config, depth)}
    ratios = []
    for phase in ("prefill", "decode"):
        own, other = (tuple(seconds[phase, llm][1:]) for llm in (shared, every))
        ratios.append(
            Ratio(
                depth=depth,
                phase=phase,
                shared_seconds=own,
                every_seconds=other,
                measured=statistics.median(other) / statistics.median(own),
                predicted=predicted[phase],
                published=PUBLISHED[phase],
            )
        )
    return ratios


def work_ratio(config: GlmConfig, depth: int) -> float:
    """Of the FLOP for a token at that depth: many tokens at once are bound by arithmetic."""
    work = token_work(config, depth)
    return (work.total - work.indexer + work.indexer_in_every_layer) / work.total


def bytes_ratio(config: GlmConfig, depth: int) -> float:
    """Of the bytes that one token reads, weights, index keys and selected latents in BF16: it is bound by memory."""
    layers = config.num_hidden_layers
    keys = 2 * depth * config.index_head_dim
    rest = 2 * activated_parameters(config) + 2 * layers * config.index_topk * config.latent_dim
    return (rest + layers * keys) / (rest + len(config.full_layers) * keys)


def fill(session: Session, depth: int, vocab_size: int) -> None:
    """A context of `depth` tokens: the first are read, the cache rows of the others are drawn from theirs."""
    generator = torch.Generator().manual_seed(0)
    num_read = min(SEED_TOKENS, depth)
    session.prefill(torch.randint(vocab_size, (num_read,), generator=generator))
    session._reserve(depth)
    cache, page_size = session._cache.view(), session._cache.page_size
    rows = (session._page_table[0, :, None] * page_size + torch.arange(page_size)).flatten()[:depth]
    drawn = rows[torch.randint(num_read, (depth - num_read,), generator=generator)]
    for pool in (*cache.latents, *cache.index_keys):
        if pool is not None:
            pool.index_copy_(0, rows[num_read:], pool.index_select(0, drawn))
    session._token_ids += [0] * (depth - num_read)


def prefill(session: Session) -> None:
    session.prefill([7] * PROMPT_TOKENS)


def decode(session: Session) -> None:
    for _ in range(DECODE_TOKENS):
        session.decode(7)


def timed(session: Session, work: Callable[[Session], object]) -> float:
    """Seconds of some reading, which is forgotten afterwards."""
    length = session.context_length
    begun = time.perf_counter()
    work(session)
    seconds = time.perf_counter() - begun
    session.truncate(length)
    return seconds


if __name__ == "__main__":
    main()
