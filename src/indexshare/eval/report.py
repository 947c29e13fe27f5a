"""What the demo found: the table for the terminal, and one page with the pictures that needs nothing but itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from indexshare import runtime
from indexshare.errors import RequestError
from indexshare.eval.machine import MachineReport
from indexshare.eval.measure import Measurement
from indexshare.eval.pictures import Curve, needle_picture, time_picture
from indexshare.eval.retrieval import LengthResult

COLUMNS = (
    "attention",
    "tokens",
    "prefill tok/s",
    "decode tok/s",
    "peak MiB",
    "cache MiB",
    "indexer time",
    "facts found",
)
NOTE = (
    "peak: resident memory of the whole process, torch and weights included. indexer time: part of the prefill spent "
    "on index scores and top-k. In 'indexer in every layer' a shared layer borrows the indexer before it."
)
PAGE_STYLE = """
:root{color-scheme:light dark;--text:#24292f;--quiet:#667080;--line:#d8dee4;--back:#fff;--soft:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--quiet:#9aa4b1;--line:#30363d;--back:#0d1117;--soft:#161b22}}
body{font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;color:var(--text);background:var(--back);
max-width:860px;margin:40px auto;padding:0 20px}
h1{font-size:28px;margin:0 0 4px}h2{font-size:19px;margin:40px 0 8px}p.quiet,td.quiet,figcaption{color:var(--quiet)}
figure{margin:28px 0;overflow-x:auto}svg{max-width:100%;height:auto}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600;background:var(--soft)}tr.last td{font-weight:600}
table.asked :is(td,th):nth-child(-n+3){text-align:left}table.asked td:nth-child(3){white-space:normal;width:60%}
table.plain td{white-space:normal;text-align:left}table.plain td:first-child{color:var(--quiet);white-space:nowrap}
table.figures th{white-space:normal;vertical-align:bottom}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """long: IndexShare at full length. table: the three variants at the same, shorter length. needles: retrieval at
    several lengths, ascending; the shortest ones only when a page was asked for."""

    model: str
    seed: int
    machine: MachineReport
    long: Measurement
    table: tuple[Measurement, ...]
    needles: tuple[LengthResult, ...]


def cells(measurement: Measurement) -> tuple[str, ...]:
    """One row of the table as texts, in the order of COLUMNS."""
    share, peak = measurement.indexer_share, measurement.peak_bytes
    return (
        measurement.name,
        f"{measurement.num_tokens:,}",
        f"{measurement.prefill_tokens_per_second:,.0f}",
        f"{measurement.decode_tokens_per_second:,.1f}",
        "unknown" if peak is None else f"{peak / runtime.MIB:,.0f}",
        f"{measurement.cache_bytes / runtime.MIB:,.1f}",
        "unknown" if share is None else f"{share:.0%}",
        f"{measurement.num_correct}/{len(measurement.answers)}",
    )


def render(result: DemoResult) -> RenderableType:
    """The three variants at the shorter length and, below, IndexShare at full length."""
    machine = result.machine
    title = f"{result.model}, {machine.dtype}, {machine.processor}, {_threads(machine)}"
    picture = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    picture.add_column(COLUMNS[0], max_width=15)
    for column in COLUMNS[1:]:
        picture.add_column(column.replace(" ", "\n"), justify="right")  # the table fits 80 columns
    for measurement in result.table:
        picture.add_row(*cells(measurement), end_section=measurement is result.table[-1])
    picture.add_row(*cells(result.long))
    return Group(Text(), picture, Text(NOTE, style="dim"))


def curves(result: DemoResult) -> list[Curve]:
    """Reading time of the other variants, and of IndexShare at full length."""
    return [Curve(name=each.name, points=each.curve) for each in (*result.table[:-1], result.long)]


def write_pictures(result: DemoResult, directory: Path) -> tuple[Path, Path]:
    """Write the two pictures as time.svg and needles.svg, for a README; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "time.svg", directory / "needles.svg"
    for path, picture in zip(paths, (time_picture(curves(result)), needle_picture(result.needles)), strict=True):
        path.write_text(picture, encoding="utf-8")
    return paths


def write_page(result: DemoResult, path: Path) -> None:
    """Write the page; a file of that name is replaced at once or not at all. Raises RequestError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(page(result), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def page(result: DemoResult) -> str:
    """The result as one HTML text without any external resource."""
    long, machine = result.long, result.machine
    summary = (
        f"{result.model} read {long.num_tokens:,} tokens of Python source once, in {long.curve[-1][1]:,.0f} seconds on "
        f"{_threads(machine)} of {machine.processor}, and found {long.num_correct} of {len(long.answers)} "
        "facts hidden in them."
    )
    rows = [cells(each) for each in (*result.table, long)]
    asked = [
        (answer.subject, answer.value, answer.reply, f"{answer.depth:.0%}", "\u2713" if answer.is_correct else "\u2717")
        for answer in long.answers
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>IndexShare: {escape(result.model)}</title><style>{PAGE_STYLE}</style></head><body>"
        f"<h1>IndexShare, measured</h1><p>{escape(summary)}</p>"
        f"<figure>{time_picture(curves(result))}<figcaption>Seconds from the first token until this many were read, "
        "chunk by chunk. Sparse attention with top-k keys grows with the length only through its indexers; IndexShare "
        "runs them in some layers and shares their choice.</figcaption></figure>"
        f"<figure>{needle_picture(result.needles)}<figcaption>Exact answers through the chat template, and the share "
        "of questions for which at least one full layer had the fact among its selected keys.</figcaption></figure>"
        f"<h2>Three ways to attend</h2>{html_table(COLUMNS, rows, 'figures')}<p class=quiet>{escape(NOTE)}</p>"
        f"<h2>Asked at {long.num_tokens:,} tokens</h2>"
        f"{html_table(('access code of', 'is', 'the model said', 'depth', ''), asked, 'asked')}"
        f"<h2>Machine</h2>{html_table((), _machine_rows(result), 'plain')}</body></html>\n"
    )


def _machine_rows(result: DemoResult) -> list[tuple[str, str]]:
    machine = result.machine
    return [
        ("processor", f"{machine.processor}, {machine.num_cpus} CPUs, {_threads(machine)}"),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("system", machine.system),
        ("model", f"{result.model}, {machine.dtype} on {machine.device}; seed {result.seed}"),
        ("versions", f"indexshare {machine.indexshare}, torch {machine.torch}, Python {machine.python}"),
    ]


def _threads(machine: MachineReport) -> str:
    return "1 thread" if machine.num_threads == 1 else f"{machine.num_threads} threads"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], style: str) -> str:
    """A table of PAGE_STYLE; everything in it is escaped. The last row of style "figures" stands out."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f'<tr class="{"last" if style == "figures" and row is rows[-1] else ""}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
