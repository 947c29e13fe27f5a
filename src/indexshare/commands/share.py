"""`indexshare share`: which layers may share an indexer's choice."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from indexshare.options import DEFAULT_MODEL, AsJson, Model, ModelOptions, requires

if TYPE_CHECKING:
    from indexshare.engine.llm import LLM
    from indexshare.share.calibration import CalibrationRow
    from indexshare.share.distill import StoppedError

app = App(
    name="share",
    help="Which layers may share an indexer's choice: measure it, find a pattern, train for it.",
    help_epilogue="Examples:\n\n"
    "    indexshare share overlap nano --data texts/\n"
    "    indexshare share search nano --data texts/ --keep 1/4\n"
    "    indexshare share convert MODEL --data texts/ --keep 1/4 --output shared",
    help_format="plaintext",
)

Data = Annotated[
    list[str],
    Parameter(consume_multiple=True, negative="", help="Files or folders: text, code, JSON lines, or from data build."),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Which calibration rows to take from the data."""

    rows: int = 16
    """Rows of text to measure on."""
    length: int | None = None
    """Tokens in a row; by default four times index_topk."""
    seed: int = 0
    """Of the choice of rows."""

    def read(self, llm: LLM, data: list[str]) -> tuple[CalibrationRow, ...]:
        """The rows, on the model's device. Raises TrainingError for data that does not fill one."""
        from indexshare.share.calibration import read_rows

        length = 4 * llm.config.index_topk if self.length is None else self.length
        return read_rows(data, llm.tokenizer, num_rows=self.rows, length=length, seed=self.seed, device=llm.device)


DEFAULT_ROWS = RowOptions()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """How long, how fast and on what indexers are trained."""

    warmup_steps: int = 1000
    """Steps with dense attention in which only indexers move."""
    sparse_steps: int = 4000
    """Steps with the chosen keys in which the rest of the model moves too."""
    only_indexers: Annotated[bool, Parameter(negative="")] = False
    """Keep the rest of the model frozen in those as well."""
    length: int | None = None
    """Tokens in a row; by default four times index_topk."""
    batch_size: int = 8
    """Rows in a step."""
    warmup_rate: float = 5e-3
    """Learning rate of the warm-up at its start."""
    warmup_end_rate: float = 2e-4
    """And at its end."""
    sparse_rate: float = 1e-5
    """Learning rate of the sparse steps."""
    stride: int = 1
    """Indexers learn from every so manyth token: less work on long rows."""
    held_out_rows: int = 8
    """Rows that are measured on before and after, of documents that are not trained on."""
    checkpoint_every: int = 200
    """Steps between checkpoints, from which a stopped run goes on."""
    seed: int = 0
    """Of the order of the rows and of new indexers."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class IndexerOptions:
    """Sizes of indexers for a model that has none."""

    index_heads: int | None = None
    """Heads of new indexers; by default half of the attention's."""
    index_head_dim: int | None = None
    """Their head size; by default twice the rotary width."""
    index_topk: int | None = None
    """Keys that an indexer chooses; by default the model's, else 2,048, or an eighth of its positions if fewer."""


DEFAULT_DISTILL = DistillOptions()
DEFAULT_INDEXERS = IndexerOptions()


def say_stopped(stop: StoppedError, as_json: bool) -> None:
    """As `indexshare train` ends when a signal stopped it: a sentence, and no error."""
    from indexshare.terminal import print_json

    if as_json:
        print_json({"stopped": str(stop)})
    else:
        sys.stdout.write(f"{stop}\n")


@app.command(help_epilogue="Example:\n\n    indexshare share overlap nano --data texts/ --output overlap")
def overlap(
    model: Model,
    /,
    *,
    data: Data,
    output: Path | None = None,
    rows: RowOptions = DEFAULT_ROWS,
    as_json: AsJson = False,
    load: ModelOptions = DEFAULT_MODEL,
) -> None:
    """How far the layers' choices of keys agree, for all pairs of layers with an indexer.

    Args:
        output: Directory for overlap.json and overlap.png.
    """
    from indexshare.eval.progress import bar
    from indexshare.share.overlap import measure_overlap
    from indexshare.share.render import render_overlap
    from indexshare.share.state import output_directory, write_json
    from indexshare.terminal import show

    with requires("train"):
        from indexshare.share.pictures import draw_overlap

    with output_directory(output) if output is not None else nullcontext():
        llm = load.load(model)
        with bar("overlap", "rows") as progress:
            result = measure_overlap(llm.model, rows.read(llm, data), progress)
        if output is not None:
            write_json(output / "overlap.json", result)
            draw_overlap(result, output / "overlap.png")
    show(result, render_overlap(result), as_json)


@app.command(
    help_epilogue="Examples:\n\n"
    "    indexshare share search nano --data texts/ --keep 1/4\n"
    "    indexshare share search zai-org/GLM-5.2 --data texts/ --keep 1/8 --blocks 4"
)
def search(
    model: Model,
    /,
    *,
    data: Data,
    keep: str = "1/4",
    blocks: int = 1,
    method: Literal["lazy", "greedy"] = "lazy",
    output: Path | None = None,
    rows: RowOptions = DEFAULT_ROWS,
    as_json: AsJson = False,
    load: ModelOptions = DEFAULT_MODEL,
) -> None:
    """Find which layers can do without an indexer, by the loss; a search that was stopped goes on where it was.

    Args:
        keep: Share of the layers that keep an indexer.
        blocks: Blocks of layers that are searched in turn, of about the same length; each begins with an indexer, which
            stays, as a pipeline stage has to.
        method: lazy measures the candidates that may win, greedy all of them each time, as in the paper.
        output: Directory for the state, result.json and curve.png; by default runs/search-MODEL, with - for each /.
    """
    from indexshare.eval.progress import bar
    from indexshare.share.render import render_search
    from indexshare.share.search import PatternSearch
    from indexshare.share.state import output_directory
    from indexshare.terminal import show

    with requires("train"):
        from indexshare.share.pictures import draw_search

    directory = output or Path("runs") / f"search-{model.strip('/').replace('/', '-')}"
    with output_directory(directory):
        llm = load.load(model)
        calibration = rows.read(llm, data)
        with bar("search", "rows") as progress:
            result = PatternSearch(
                llm.model,
                calibration,
                keep=keep,
                num_blocks=blocks,
                method=method,
                directory=directory,
                progress=progress,
            ).search()
        draw_search(result, directory / "curve.png")
    show(result, render_search(result), as_json)


@app.command(
    help_epilogue="Examples:\n\n"
    "    indexshare share distill zai-org/GLM-4.7-Flash --freq 4 --data texts/ --output flash-shared\n"
    "    indexshare share distill nano --pattern FSFSSSSS --data texts/ --output nano-shared "
    "--warmup-steps 100 --sparse-steps 200 --batch-size 1"
)
def distill(
    model: Model,
    /,
    *,
    data: Data,
    output: Path,
    pattern: str | None = None,
    freq: int | None = None,
    schedule: DistillOptions = DEFAULT_DISTILL,
    indexers: IndexerOptions = DEFAULT_INDEXERS,
    device: str = "auto",
    threads: int | None = None,
    as_json: AsJson = False,
) -> None:
    """Give a model a pattern and train its indexers for the layers they serve; what was stopped goes on where it was.

    A model without indexers gets some. OUTPUT becomes a model directory with distillation.json in it: how well each
    layer's attention was and is followed, and the loss, on held-out rows. It runs in one process.

    Args:
        output: Directory to write; nothing is overwritten. Checkpoints and logs are in OUTPUT-run beside it.
        pattern: Layers that run an indexer (F) and that use the choice of the last F (S), one letter each.
        freq: In place of a pattern: three F, then one in so many.
        device: Where to train: auto, cpu, cuda, ...
        threads: CPU threads; by default all that this process may use.
    """
    from indexshare import runtime
    from indexshare.share.distill import IndexSizes, Schedule, StoppedError, distill_model, render
    from indexshare.terminal import show

    runtime.set_threads(threads)
    sizes = IndexSizes(num_heads=indexers.index_heads, head_dim=indexers.index_head_dim, topk=indexers.index_topk)
    try:
        result = distill_model(
            model,
            data,
            output,
            pattern=pattern,
            freq=freq,
            sizes=sizes,
            schedule=Schedule(**vars(schedule)),
            device=device,
        )
    except StoppedError as stop:
        return say_stopped(stop, as_json)
    show(result, render(result), as_json)


@app.command(
    help_epilogue="Examples:\n\n"
    "    indexshare share convert zai-org/GLM-4.7-Flash --keep 1/4 --data texts/ --output flash-shared\n"
    "    indexshare share convert MODEL --keep 1/4 --data texts/ --output shared --warmup-steps 100 --sparse-steps 400"
)
def convert(
    model: Model,
    /,
    *,
    data: Data,
    output: Path,
    keep: str = "1/4",
    blocks: int = 1,
    method: Literal["lazy", "greedy"] = "lazy",
    rows: int = 16,
    schedule: DistillOptions = DEFAULT_DISTILL,
    indexers: IndexerOptions = DEFAULT_INDEXERS,
    device: str = "auto",
    threads: int | None = None,
    as_json: AsJson = False,
) -> None:
    """All of it in order: overlap, search, distillation; ends in a model directory with report.html.

    What was stopped goes on when the same command is given again. A model without indexers gets one in every layer
    first. It runs in one process.

    Args:
        output: Directory to write; nothing is overwritten. The steps are in OUTPUT-run beside it.
        keep: Share of the layers that keep an indexer.
        blocks: Blocks of layers that are searched in turn, of about the same length; each begins with an indexer, which
            stays, as a pipeline stage has to.
        method: lazy measures the candidates that may win, greedy all of them each time, as in the paper.
        rows: Rows of text for overlap and search, of documents that are not trained on.
        device: Where to train: auto, cpu, cuda, ...
        threads: CPU threads; by default all that this process may use.
    """
    from indexshare import runtime
    from indexshare.share.distill import IndexSizes, Schedule, StoppedError
    from indexshare.share.report import render_conversion
    from indexshare.terminal import show

    with requires("train"):
        from indexshare.share.convert import convert_model

    runtime.set_threads(threads)
    sizes = IndexSizes(num_heads=indexers.index_heads, head_dim=indexers.index_head_dim, topk=indexers.index_topk)
    try:
        result = convert_model(
            model,
            data,
            output,
            keep=keep,
            num_blocks=blocks,
            method=method,
            num_rows=rows,
            sizes=sizes,
            schedule=Schedule(**vars(schedule)),
            device=device,
        )
    except StoppedError as stop:
        return say_stopped(stop, as_json)
    show(result, render_conversion(result), as_json)
