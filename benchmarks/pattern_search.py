"""How good and how much work the searches for a pattern are: greedy as in the IndexCache paper, lazy, equal spacing.

    python benchmarks/pattern_search.py                  all parts, about 8 minutes on two cores that do nothing else
    python benchmarks/pattern_search.py --parts planted,graded --json out.json
    python benchmarks/pattern_search.py --parts graded --layers 12 --seeds 1       the smallest, a minute

planted: layers that may share by construction, so that the right pattern is known. graded: the same, each layer away
from that by a share of its own, so that nothing shares for nothing. nano: the shipped model with an indexer in every
layer, the new ones trained here for STEPS steps, and an index_topk small enough for the choice to matter.
"""

import argparse
import json
import statistics
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from planted import own_answers, planted_model
from rich.console import Console
from rich.table import Table

from indexshare import runtime
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import Batch, TokenRows
from indexshare.engine.resolve import packaged_model
from indexshare.kernels import registry
from indexshare.model import native
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model
from indexshare.share.attach import attach_indexers
from indexshare.share.calibration import CalibrationRow, PatternRunner, batch_tensors
from indexshare.share.search import Method, PatternSearch, SearchResult
from indexshare.train.losses import step_loss

PLANTED = {12: "FSSFSSFSFSSS", 16: "FSSFSFSFSSFSFSSS", 24: "FSSFSSFSFSSSFFSSSSFSFSSS"}
STEPS = 60
TOPK, LENGTH, NANO_ROWS = 64, 512, 8
PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One search of one model. costs are nats a token above the loss with all indexers, on the calibration rows and on
    others; work is a share of that of the plain algorithm, in both with the output matrix and the start."""

    part: str
    method: str
    pattern: str
    cost: float
    cost_elsewhere: float
    work: float
    is_planted: bool | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="planted,graded,nano", help="which, with commas")
    parser.add_argument("--layers", default="12,16,24", help="sizes of planted and graded models, with commas")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind, or sets of rows")
    parser.add_argument("--json", type=Path, help="write every line")
    options = parser.parse_args()
    native.enable()
    runtime.set_threads()
    sizes = [int(number) for number in options.layers.split(",")]
    parts = {
        "planted": partial(planted_part, sizes),
        "graded": partial(graded_part, [number for number in sizes if number < 24]),
        "nano": nano_part,
    }
    console = Console()
    lines: list[Line] = []
    for name in options.parts.split(","):
        for line in parts[name](options.seeds):
            costs = f"{line.cost:.4f} {line.cost_elsewhere:.4f}"
            console.print(f"{line.part:10} {line.method:8} {line.pattern} {costs} {line.work:.3f}")
            lines.append(line)
    console.print(summary(lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8")


def planted_part(sizes: list[int], seeds: int) -> Iterator[Line]:
    """Keeps as many indexers as were planted."""
    for num_layers in sizes:
        pattern = PLANTED[num_layers]
        for seed in range(seeds):
            model = planted_model(pattern, seed)
            rows = own_answers(model, 8, 64, seed)
            keep = f"{pattern.count('F')}/{num_layers}"
            yield from compare(
                f"planted {num_layers}", model, rows, own_answers(model, 8, 64, seed + 100), keep, pattern
            )


def graded_part(sizes: list[int], seeds: int) -> Iterator[Line]:
    for num_layers in sizes:
        for spread in (0.5, 1.0):
            for seed in range(seeds):
                model = planted_model(PLANTED[num_layers], seed, spread)
                rows, others = own_answers(model, 12, 64, seed), own_answers(model, 24, 64, seed + 100)
                yield from compare(f"graded {num_layers}", model, rows, others, "1/4")


def nano_part(seeds: int) -> Iterator[Line]:
    model, data = nano_with_indexers(seeds)
    for seed in range(seeds):
        taken = [data.batch(index, 1) for index in range(seed * 2 * NANO_ROWS, (seed + 1) * 2 * NANO_ROWS)]
        rows = tuple(CalibrationRow.from_batch(batch, torch.device("cpu")) for batch in taken)
        yield from compare("nano", model, rows[:NANO_ROWS], rows[NANO_ROWS:], "1/4")


def nano_with_indexers(seeds: int = 3) -> tuple[GlmForCausalLM, TokenRows]:
    """nano with eight indexers, the four new ones trained against dense attention; all else is as shipped."""
    directory = packaged_model()
    loaded = load_model(directory, dtype=torch.float32)
    model = attach_indexers(loaded, "F" * loaded.config.num_hidden_layers, topk=TOPK)
    root = Path(sysconfig.get_paths()["stdlib"])
    data = TokenRows.from_files([root / name for name in PACKAGES], Tokenizer.from_directory(directory), length=LENGTH)
    shared = [layer for layer in range(len(model.stack.layers)) if not loaded.config.is_full(layer)]
    new = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".indexer." in name and int(name.split(".")[2]) in shared
    }
    model.requires_grad_(False)
    for parameter in new.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(new.values(), lr=3e-3, weight_decay=0.0)
    first = 2 * NANO_ROWS * seeds
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        train_step(model, data.batch(first + step, 1), optimizer)
    return model.requires_grad_(False).eval(), data


def train_step(model: GlmForCausalLM, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    with registry.specifications():
        losses = step_loss(
            model,
            *batch_tensors(batch, torch.device("cpu")),
            batch.segment_starts,
            attention="dense",
            trains="indexer",
            index_stride=4,
            index_target="visible",
        )
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()


def compare(
    part: str,
    model: GlmForCausalLM,
    rows: tuple[CalibrationRow, ...],
    others: tuple[CalibrationRow, ...],
    keep: str,
    planted: str | None = None,
) -> Iterator[Line]:
    """One line for each method and one for equal spacing."""
    elsewhere = PatternRunner(model=model, rows=others)
    base = elsewhere.run("F" * len(model.stack.layers))

    def line(method: str, result: SearchResult, pattern: str, loss: float) -> Line:
        return Line(
            part=part,
            method=method,
            pattern=pattern,
            cost=loss - result.start_loss,
            cost_elsewhere=elsewhere.loss(elsewhere.run(pattern, base)) - elsewhere.loss(base),
            work=result.work / result.plain_work if method != "equal" else 0.0,
            is_planted=None if planted is None else pattern == planted,
        )

    methods: tuple[Method, ...] = ("greedy", "lazy")
    for method in methods:
        result = PatternSearch(model, rows, keep=keep, method=method).search()
        yield line(method, result, result.pattern, result.loss)
    assert result.uniform_pattern is not None and result.uniform_loss is not None
    yield line("equal", result, result.uniform_pattern, result.uniform_loss)


def summary(lines: list[Line]) -> Table:
    """Means of each part and method, and how often the cost was at most that of greedy."""
    table = Table("models", "method", "cost", "elsewhere", "at most greedy's", "planted found", "work")
    for part in dict.fromkeys(line.part for line in lines):
        of_part = [line for line in lines if line.part == part]
        greedy = [line for line in of_part if line.method == "greedy"]
        for method in dict.fromkeys(line.method for line in of_part):
            found = [line for line in of_part if line.method == method]
            wins = sum(one.cost <= other.cost + 1e-6 for one, other in zip(found, greedy, strict=True))
            planted = [line.is_planted for line in found if line.is_planted is not None]
            table.add_row(
                part,
                method,
                f"{statistics.mean(line.cost for line in found):.4f}",
                f"{statistics.mean(line.cost_elsewhere for line in found):.4f}",
                f"{wins} of {len(found)}",
                f"{sum(planted)} of {len(planted)}" if planted else "",
                f"{statistics.mean(line.work for line in found):.2f}" if method != "equal" else "",
            )
    return table


if __name__ == "__main__":
    main()
