"""A model with an indexer in every layer, or in none, becomes an IndexShare model: all steps in order, each resumable.

OUTPUT-run/full           of a model without indexers: one in every layer, warmed up      (share distill)
OUTPUT-run/overlap.json   what the layers' choices have in common                          (share overlap)
OUTPUT-run/search         the pattern with the least loss                                  (share search)
OUTPUT-run/model          its indexers trained for the layers they serve                   (share distill)
OUTPUT                    that model, with report.html and report.json

The pattern is chosen by rows that are neither trained on nor measured on in the end.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from indexshare import __version__, runtime
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import Batch
from indexshare.engine.resolve import resolve_model
from indexshare.errors import ConfigError
from indexshare.eval.progress import bar
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model
from indexshare.share.attach import with_indexers
from indexshare.share.calibration import CalibrationRow, PatternRunner, own_pattern, weights_fingerprint
from indexshare.share.distill import REPORT_FILE, Distillation, IndexSizes, Schedule, check_memory, distill_model
from indexshare.share.overlap import Overlap, measure_overlap
from indexshare.share.pictures import draw_overlap, draw_search
from indexshare.share.report import write_report
from indexshare.share.search import Method, PatternSearch, SearchResult, plan_search
from indexshare.share.split import split_rows
from indexshare.share.state import output_directory, write_json, writing
from indexshare.train.distributed import require_one_process


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A model on the held-out rows. loss: nats a token; index_bytes: of index keys a token, in BF16."""

    name: str
    pattern: str | None
    loss: float
    index_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was made of which model, and what it lost. pattern: the model's own, None for one without indexers.
    variants: from dense attention to the result, on rows that neither the search nor the training has seen. overlap:
    None for a single indexer."""

    model: str
    output: str
    pattern: str | None
    variants: tuple[Variant, ...]
    overlap: Overlap | None
    search: SearchResult
    distillation: Distillation
    version: str = __version__


def convert_model(
    model: str,
    sources: Sequence[str | os.PathLike[str]],
    output: Path,
    *,
    keep: str = "1/4",
    num_blocks: int = 1,
    method: Method = "lazy",
    num_rows: int = 16,
    sizes: IndexSizes | None = None,
    schedule: Schedule | None = None,
    device: str = "auto",
) -> Conversion:
    """Convert a model into the directory `output`; what was stopped goes on when called again.

    keep, num_blocks, method: of the search, over num_rows rows. sizes, schedule: as in `distill_model`, and so is what
    is raised.
    """
    require_one_process("conversion")
    schedule = schedule or Schedule()
    if num_rows < 1:
        raise ConfigError(f"rows must be at least 1, not {num_rows}: the search needs some")
    if output.exists():
        raise ConfigError(f"{output} exists: name another directory")
    run = Path(f"{output}-run")
    with output_directory(run):
        source = resolve_model(model)
        config = GlmConfig.from_json(source)
        searched = config
        if not config.has_indexers:
            every_layer = "F" * config.num_hidden_layers
            searched = with_indexers(config, every_layer, **(sizes or IndexSizes()).given())
        plan_search(searched, _pattern(searched), keep, num_blocks)  # raises now what the search would raise later
        target = runtime.resolve_device(device)
        check_memory(searched, schedule, str(target))
        length = schedule.length or 4 * searched.index_topk
        schedule = replace(schedule, length=length)
        data = split_rows(
            sources,
            Tokenizer.from_directory(source),
            length=length,
            num_held_out=schedule.held_out_rows,
            num_calibration=num_rows,
            seed=schedule.seed,
        )
        given = load_model(source, dtype=torch.float32, device=target, quant="none")
        _begin_or_go_on(
            run,
            {
                "model": weights_fingerprint(given),
                "data": data.fingerprint,
                "keep": keep,
                "blocks": num_blocks,
                "method": method,
                "rows": num_rows,
                "sizes": msgspec.to_builtins(sizes),
                "schedule": msgspec.to_builtins(schedule),
            },
        )
        distill = partial(distill_model, sources=sources, calibration_rows=num_rows, device=device)
        full, made = source, run / "model"
        if not config.has_indexers:
            full = run / "full"
            if not full.is_dir():
                del given  # one model at a time
                warm_up = replace(schedule, sparse_steps=0)
                distill(os.fspath(source), output=full, pattern=_pattern(searched), sizes=sizes, schedule=warm_up)
            given = load_model(full, dtype=torch.float32, device=target, quant="none")
        overlap = _overlap(given, _rows(data.calibration, target), run)
        with bar("search", "rows") as report:
            found = PatternSearch(
                given,
                _rows(data.calibration, target),
                keep=keep,
                num_blocks=num_blocks,
                method=method,
                directory=run / "search",
                progress=report,
            ).search()
        draw_search(found, run / "search.png")
        own_name = "as it was" if config.has_indexers else "an indexer in every layer"
        untrained = _untrained(given, _rows(data.held_out, target), found, own_name)
        del given
        if not made.exists():
            distill(os.fspath(full), output=made, pattern=found.pattern, schedule=schedule)
        result = _conversion(model, output, config, overlap, found, untrained, made)
        with writing(output):
            write_json(made / REPORT_FILE, result.distillation)
            write_json(made / "report.json", result)
            write_report(result, run, made / "report.html")
            made.rename(output)
    return result


def _pattern(config: GlmConfig) -> str:
    return "".join("F" if config.is_full(layer) else "S" for layer in range(config.num_hidden_layers))


def _rows(batches: Sequence[Batch], device: torch.device) -> tuple[CalibrationRow, ...]:
    return tuple(CalibrationRow.from_batch(batch, device) for batch in batches)


def _conversion(
    model: str,
    output: Path,
    config: GlmConfig,
    overlap: Overlap | None,
    found: SearchResult,
    untrained: list[Variant],
    made: Path,
) -> Conversion:
    """All that was measured; `made` has what distillation says, which is to be moved to `output`."""
    distillation = msgspec.json.decode((made / REPORT_FILE).read_bytes(), type=Distillation)
    dense = Variant(
        name="dense attention" if config.has_indexers else "as it was: dense attention",
        pattern=None,
        loss=distillation.before.dense_loss,
        index_bytes=0,
    )
    trained = replace(untrained[-1], name="searched and distilled", loss=distillation.after.sparse_loss)
    return Conversion(
        model=model,
        output=os.fspath(output),
        pattern=_pattern(config) if config.has_indexers else None,
        variants=(dense, *untrained, trained),
        overlap=overlap,
        search=found,
        distillation=replace(distillation, output=os.fspath(output)),
    )


def _begin_or_go_on(run: Path, wanted: dict[str, object]) -> None:
    """Note what is asked for; a run that was begun for something else is refused, so that no step of it is used."""
    path = run / "convert.json"
    if not path.exists():
        write_json(path, wanted)
        return
    begun = json.loads(path.read_bytes())
    if changed := sorted(key for key in wanted if begun.get(key) != wanted[key]):
        raise ConfigError(
            f"{run} was begun with other values of {', '.join(changed)}: remove it, or name another output directory"
        )


def _overlap(model: GlmForCausalLM, rows: tuple[CalibrationRow, ...], run: Path) -> Overlap | None:
    if own_pattern(model).count("F") < 2:
        return None
    path = run / "overlap.json"
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=Overlap)
    with bar("overlap", "rows") as report:
        result = measure_overlap(model, rows, report)
    draw_overlap(result, run / "overlap.png")
    write_json(path, result)
    return result


def _untrained(
    model: GlmForCausalLM, rows: tuple[CalibrationRow, ...], found: SearchResult, own_name: str
) -> list[Variant]:
    """The losses on held-out rows with the model's own pattern and with others, the one that was found last."""
    runner = PatternRunner(model=model, rows=rows)
    own, per_layer = own_pattern(model), 2 * model.config.index_head_dim
    patterns = {own_name: own, "equal spacing": found.uniform_pattern, "searched": found.pattern}
    wanted = {name: pattern for name, pattern in patterns.items() if pattern is not None}
    variants = []
    with bar("measuring patterns", "rows") as report:
        for name, pattern in wanted.items():
            for run in runner.iterate(pattern):
                report(len(variants) * len(rows) + len(run.nats), len(wanted) * len(rows))
            bytes_a_token = pattern.count("F") * per_layer
            variants.append(Variant(name=name, pattern=pattern, loss=runner.loss(run), index_bytes=bytes_a_token))
    return variants
