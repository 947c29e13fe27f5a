"""What a build kept, what it dropped and why: as values, as a table in a terminal, as one page without scripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from indexshare.data.quality import REASONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Documents and their bytes of UTF-8, or of the file where it was not read."""

    documents: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """What one reason dropped. examples: names of sources, never contents."""

    reason: str
    documents: int
    bytes: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One source as it was given: what it had, and what of it stayed on either side."""

    name: str
    read: Amount
    kept: Amount
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One side of the data. segments: runs of documents that see each other, of one repository each."""

    documents: int
    segments: int
    tokens: int
    shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """The result of `indexshare data build`. funnel: what is left after each step, in order. seconds: of each stage, in
    the run that finished."""

    output: str
    funnel: tuple[tuple[str, Amount], ...]
    dropped: tuple[Reason, ...]
    sources: tuple[Source, ...]
    licenses: tuple[tuple[str, int], ...]
    train: Split
    held_out: Split
    evaluation_texts: int
    evaluation_ngrams: int
    common_ngrams: int
    seconds: tuple[tuple[str, float], ...]


def render(report: BuildReport) -> RenderableType:
    """The report for a terminal, without what the reasons mean."""
    tables = (_table(*table) for table in _tables(report, explain=False))
    lines = [f"{report.output}/report.html says what the reasons mean"]
    if not report.held_out.documents:
        lines.append("nothing is held out, since few documents are left: a larger --held-out takes some")
    return Group(*tables, *lines)


def why_nothing_is_left(report: BuildReport) -> str:
    """In a sentence, for a build without training documents."""
    gone = [f"{row.documents:,} dropped ({row.reason}: {REASONS[row.reason]})" for row in report.dropped]
    if report.held_out.documents:
        gone.append(f"{report.held_out.documents:,} held out (--held-out)")
    return (
        f"nothing is left to train on; documents: {'; '.join(gone) or 'none'}. {report.output}/report.html says more."
        " Give other sources or options, and another --output"
    )


def to_html(report: BuildReport) -> str:
    """The report as one page that needs nothing else."""
    body = "".join(
        f"<h2>{escape(title)}</h2><table><tr>{''.join(f'<th>{escape(name)}</th>' for name in columns)}</tr>"
        + "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        + "</table>"
        for title, columns, rows in _tables(report, explain=True)
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>indexshare data build</title><style>'
        "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ccc;text-align:left;"
        "vertical-align:top}td{overflow-wrap:anywhere}:root{color-scheme:light dark}</style>"
        f"<h1>{escape(report.output)}</h1>{body}</html>\n"
    )


_Rows = Sequence[tuple[str, ...]]


def _tables(report: BuildReport, *, explain: bool) -> list[tuple[str, tuple[str, ...], _Rows]]:
    first = report.funnel[0][1]
    funnel = [
        (step, f"{left.documents:,}", size(left.bytes), _share(left.bytes, first.bytes)) for step, left in report.funnel
    ]
    roots = [source.name for source in report.sources]
    dropped = [
        (
            row.reason,
            f"{row.documents:,}",
            size(row.bytes),
            *([REASONS[row.reason]] if explain else []),
            ", ".join(_short(name, roots) for name in row.examples[:2]),
        )
        for row in report.dropped
    ]
    because = ("because the document",) if explain else ()
    sources = [(row.name, *_cells(row.read), *_cells(row.kept), f"{row.tokens:,}") for row in report.sources]
    splits = [
        (name, f"{split.documents:,}", f"{split.segments:,}", f"{split.tokens:,}", f"{split.shards:,}")
        for name, split in (("train", report.train), ("held_out", report.held_out))
    ]
    licenses = [(name, f"{count:,}") for name, count in report.licenses]
    seconds = [(stage, f"{taken:.1f}") for stage, taken in report.seconds]
    compared = [(f"{report.evaluation_texts:,}", f"{report.evaluation_ngrams:,}", f"{report.common_ngrams:,}")]
    tables: list[tuple[str, tuple[str, ...], _Rows]] = [
        ("What was left after each step", ("step", "documents", "size", "share"), funnel),
        ("What was dropped, and why", ("reason", "documents", "size", *because, "for example"), dropped),
        ("Sources", ("source", "documents", "size", "kept", "size kept", "tokens"), sources),
        ("Licences of what was kept", ("licence", "documents"), licenses),
        ("Compared with", ("evaluation texts", "n-grams", "of which common, not counted"), compared),
        ("What was written", ("part", "documents", "segments", "tokens", "shards"), splits),
        ("Seconds", ("stage", "seconds"), seconds),
    ]
    return [table for table in tables if table[2]]


def _short(name: str, roots: Sequence[str]) -> str:
    """A document's name without its source."""
    root = max((root for root in roots if name.startswith(f"{root.rstrip('/')}/")), key=len, default="")
    return name.removeprefix(root).lstrip("/") if root else name


def _cells(amount: Amount) -> tuple[str, str]:
    return f"{amount.documents:,}", size(amount.bytes)


def size(num_bytes: int) -> str:
    """ "1.5 MB", in powers of 1,000."""
    amount = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:,.0f} {unit}" if unit == "bytes" else f"{amount:,.1f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} TB"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _table(title: str, columns: tuple[str, ...], rows: _Rows) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))  # names of files may look like markup
    return table
