"""Pictures of what was measured, as PNG: matplotlib, from the extra `train`, without a display."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from indexshare.share.overlap import Overlap
from indexshare.share.search import SearchResult
from indexshare.share.state import writing

DPI = 120


def draw_overlap(overlap: Overlap, path: Path) -> None:
    """A heat map: layers by layers, from no key in common to all."""
    size = 3.2 + min(len(overlap.layers), 60) * 0.12
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(overlap.matrix, vmin=0.0, vmax=1.0, cmap="viridis", origin="lower")
    step = -(-len(overlap.layers) // 16)
    places = range(0, len(overlap.layers), step)
    labels = [str(overlap.layers[place]) for place in places]
    axes.set_xticks(list(places), labels)
    axes.set_yticks(list(places), labels)
    axes.set(xlabel="layer", ylabel="layer", title=f"Top-{overlap.index_topk:,} keys in common")
    figure.colorbar(image, label="share of the keys")
    _save(figure, path)


def draw_search(result: SearchResult, path: Path) -> None:
    """The loss against the number of indexers taken away; equal spacing as a single point."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    losses = [result.start_loss, *(removal.loss for removal in result.removals)]
    axes.plot(range(len(losses)), losses, marker="o", markersize=3, label=f"search ({result.method})")
    if result.moves:
        axes.plot(len(result.removals), result.loss, "v", label="after moves")
    if result.uniform_loss is not None:
        axes.plot(len(result.removals), result.uniform_loss, "s", label="equal spacing")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="indexers taken away", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(path)
