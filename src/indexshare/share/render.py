"""What a person sees of overlap and search."""

from rich.console import Group, RenderableType
from rich.table import Table

from indexshare.share.overlap import Overlap
from indexshare.share.search import SearchResult

MAX_COLUMNS = 12  # a matrix of more layers does not fit on a terminal: then neighbours and extremes


def render_overlap(overlap: Overlap) -> RenderableType:
    """The matrix where it fits; of many layers what each has in common with those before it."""
    said = (
        f"mean share of the top {overlap.index_topk:,} keys in common, "
        f"{overlap.num_queries:,} queries in {overlap.num_rows:,} rows"
    )
    if len(overlap.layers) <= MAX_COLUMNS:
        table = Table("layer", *map(str, overlap.layers))
        for layer, line in zip(overlap.layers, overlap.matrix, strict=True):
            table.add_row(str(layer), *(f"{value:.2f}" for value in line))
        return Group(table, said)
    table = Table("layer", "with the indexer before", "with the first", "lowest", "highest")
    for index, layer in enumerate(overlap.layers):
        line = overlap.matrix[index]
        others = [value for other, value in enumerate(line) if other != index]
        before = f"{line[index - 1]:.2f}" if index else ""
        table.add_row(str(layer), before, f"{line[0]:.2f}", f"{min(others):.2f}", f"{max(others):.2f}")
    return Group(table, said)


def render_search(result: SearchResult) -> RenderableType:
    """The curve as a table, the pattern found, and what equal spacing would cost."""
    table = Table("indexers", "shared next", "loss", "more than at the start")
    start = result.start_loss
    table.add_row(str(result.start_pattern.count("F")), "", f"{start:.4f}", "")
    for removal in result.removals:
        row = (str(removal.pattern.count("F")), f"layer {removal.layer}")
        table.add_row(*row, f"{removal.loss:.4f}", f"{removal.loss - start:+.4f}")
    for move in result.moves:
        row = (str(result.num_full), f"layer {move.gone}, not {move.new}")
        table.add_row(*row, f"{move.loss:.4f}", f"{move.loss - start:+.4f}")
    lines = [f"pattern        {result.pattern}   loss {result.loss:.4f} ({result.loss - start:+.4f})"]
    if result.uniform_pattern is not None and result.uniform_loss is not None:
        difference = result.uniform_loss - start
        lines.append(f"equal spacing  {result.uniform_pattern}   loss {result.uniform_loss:.4f} ({difference:+.4f})")
    lines.append(
        f"{result.num_runs:,} measurements of {result.num_rows:,} rows, {result.num_tokens:,} tokens: "
        f"{result.work / result.plain_work:.0%} of the work of measuring every candidate"
    )
    lines.append(f"next: share distill --pattern {result.pattern} trains indexers for it")
    return Group(table, *lines)
