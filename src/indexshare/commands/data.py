"""`indexshare data`: from files to what training reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from indexshare.options import AsJson

app = App(
    name="data",
    help="From files to tokens that training reads: build.",
    help_epilogue="Example:\n\n    indexshare data build texts/ code/ --output data --licenses permissive",
    help_format="plaintext",
)


@app.command(
    help_epilogue="Examples:\n\n"
    "    indexshare data build texts/ books.parquet --output data\n"
    "    indexshare data build code/ --output data --licenses permissive --against questions.jsonl --workers 8"
)
def build(
    *sources: str,
    output: Path,
    tokenizer: str = "nano",
    licenses: str = "any",
    min_bytes: int = 100,
    max_bytes: int = 8 * 1024 * 1024,
    near_duplicates: float = 0.8,
    held_out: float = 0.01,
    against: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    ngram: int = 13,
    workers: int | None = None,
    as_json: AsJson = False,
) -> None:
    """Filter, deduplicate, decontaminate and tokenise; a build that was stopped goes on, with the same result.

    Args:
        sources: Files and folders: text, code, JSON lines (also .gz), Parquet.
        output: Directory to write; --data of other commands takes it. What was dropped and why is in report.html.
        tokenizer: Whose tokenizer: nano, the directory of a model, or a hub id.
        licenses: any, or a list of SPDX names, permissive, and unknown, which lets pass what states none; with commas.
        min_bytes: The smallest document.
        max_bytes: The largest document.
        near_duplicates: Share of common five-word sequences from which the later document goes; 1 keeps them.
        held_out: Share of documents for evaluation; a repository goes wholly to one side.
        against: Files and folders of evaluation sets, which no training document may overlap with.
        ngram: Words in a row that are an overlap.
        workers: Processes; by default one for each CPU.
    """
    from indexshare.data.build import BuildOptions
    from indexshare.data.build import build as run
    from indexshare.data.report import render
    from indexshare.engine.resolve import resolve_tokenizer
    from indexshare.eval.progress import bar
    from indexshare.terminal import show

    options = BuildOptions(
        sources=sources,
        output=output,
        tokenizer=resolve_tokenizer(tokenizer),
        licenses=licenses,
        min_bytes=min_bytes,
        max_bytes=max_bytes,
        near_duplicates=near_duplicates,
        held_out=held_out,
        against=tuple(against or ()),
        ngram=ngram,
        workers=workers or os.cpu_count() or 1,
    )
    report = run(options, progress=bar)
    show(report, render(report), as_json)
