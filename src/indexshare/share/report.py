"""What a conversion did, as one page without any external resource, and as tables on a terminal."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from indexshare.eval.report import PAGE_STYLE, html_table
from indexshare.share.index_quality import LAYER_COLUMNS, layer_cells

if TYPE_CHECKING:
    from indexshare.share.convert import Conversion

VARIANT_COLUMNS = ("", "pattern", "indexers", "index keys, bytes a token", "loss, nats a token", "against dense")


def variant_cells(result: Conversion) -> list[tuple[str, ...]]:
    """The rows of the table of losses."""
    dense = result.variants[0].loss
    return [
        (
            variant.name,
            variant.pattern or "",
            str(variant.pattern.count("F")) if variant.pattern else "",
            f"{variant.index_bytes:,}",
            f"{variant.loss:.4f}",
            f"{variant.loss - dense:+.4f}",
        )
        for variant in result.variants
    ]


def render_conversion(result: Conversion) -> RenderableType:
    """The table of losses, and where the rest is."""
    table = Table(*VARIANT_COLUMNS)
    for cells in variant_cells(result):
        table.add_row(*cells)
    return Group(table, f"written to {result.output}; report.html there has the rest")


def write_report(result: Conversion, pictures: Path, path: Path) -> None:
    """Write the page; `pictures` has overlap.png and search.png, which it takes in."""
    distillation = result.distillation
    search = result.search
    before, layers = distillation.before, layer_cells(distillation.before, distillation.after)
    had = "no indexers, and attended to all keys" if result.pattern is None else f"{result.pattern.count('F')} indexers"
    summary = (
        f"{result.model} had {had}; the result runs {search.num_full} in {len(before.layers)} layers. On rows that "
        f"neither the search nor the training has seen, dense attention has {result.variants[0].loss:.4f} nats a "
        f"token, the result {result.variants[-1].loss:.4f}."
    )
    steps = distillation.schedule
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>IndexShare: {escape(result.model)}</title><style>{PAGE_STYLE}</style></head><body>"
        f"<h1>Converted to IndexShare</h1><p>{escape(summary)}</p>"
        f"{html_table(VARIANT_COLUMNS, variant_cells(result), 'figures')}"
        f"<h2>Which layers may share</h2>{_picture(pictures / 'search.png', 'Loss while indexers are taken away')}"
        f"<p class=quiet>Found with {search.num_runs:,} measurements of {search.num_tokens:,} tokens, "
        f"{search.work / search.plain_work:.0%} of the work of measuring every candidate each time. "
        f"Loss on the calibration rows: {search.start_loss:.4f} with all indexers, {search.loss:.4f} with the "
        "pattern found.</p>"
        f"{_picture(pictures / 'overlap.png', 'Keys that the layers choose in common, before')}"
        f"<h2>What the indexers learned</h2>{html_table(LAYER_COLUMNS, layers, 'layers')}"
        "<p class=quiet>KL: of a layer's attention against the scores of the indexer that it uses, in nats a query. "
        "Recall: attention on the keys that this indexer chooses, over attention on as many best keys. Both under "
        f"dense attention, on held-out rows. Trained for {steps.warmup_steps:,} steps of warm-up and "
        f"{steps.sparse_steps:,} sparse ones, {distillation.num_tokens:,} tokens. indexshare {result.version}</p>"
        "</body></html>\n",
        encoding="utf-8",
    )


def _picture(path: Path, caption: str) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img style="max-width:100%" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
