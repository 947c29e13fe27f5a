"""The picture of the README: what each indexer that is taken away costs, searched and at equal distances.

    python benchmarks/conversion_picture.py docs/images/conversion.png

The model is that of pattern_search.py, nano with an indexer in all eight layers. The search sees 16 rows; the curves
are costs on 32 others.
"""

import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pattern_search import TOPK, nano_with_indexers

from indexshare import runtime
from indexshare.model import native
from indexshare.share.calibration import CalibrationRow, PatternRunner
from indexshare.share.search import PatternSearch, uniform_pattern

SEARCH_ROWS, OTHER_ROWS = 16, 32


def main(path: Path) -> None:
    native.enable()
    runtime.set_threads()
    model, data = nano_with_indexers()
    rows = tuple(
        CalibrationRow.from_batch(data.batch(index, 1), torch.device("cpu"))
        for index in range(SEARCH_ROWS + OTHER_ROWS)
    )
    result = PatternSearch(model, rows[:SEARCH_ROWS], keep="1/8", method="greedy").search()
    others = PatternRunner(model=model, rows=rows[SEARCH_ROWS:])
    num_layers = len(model.stack.layers)
    base = others.run("F" * num_layers)

    def cost(pattern: str) -> float:
        return others.loss(others.run(pattern, base)) - others.loss(base)

    patterns = {
        "searched": ["F" * num_layers, *(removal.pattern for removal in result.removals)],
        "equal distances": [uniform_pattern(number, num_layers) for number in range(num_layers, 0, -1)],
    }
    curves = {name: [(pattern, cost(pattern)) for pattern in tried] for name, tried in patterns.items()}
    for name, curve in curves.items():
        print(name, *(f"{pattern} {value:+.4f}" for pattern, value in curve), sep="\n  ", flush=True)
    draw(curves, path)


def draw(curves: dict[str, list[tuple[str, float]]], path: Path) -> None:
    """Costs by the number of indexers; the pattern of two is written beside its point."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), color, place in zip(curves.items(), ("#2563eb", "#9ca3af"), ((-34, 8), (-66, -2)), strict=True):
        kept = [pattern.count("F") for pattern, _ in curve]
        costs = [value for _, value in curve]
        axes.plot(kept, costs, marker="o", color=color, label=name)
        axes.annotate(curve[-2][0], (kept[-2], costs[-2]), place, textcoords="offset points", color=color)
    axes.margins(y=0.12)  # room for the patterns
    axes.invert_xaxis()
    axes.set(xlabel="indexers that are left, of 8", ylabel="loss above all indexers, nats a token")
    axes.set_title(f"nano, top {TOPK} of up to 512 keys, without training", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
