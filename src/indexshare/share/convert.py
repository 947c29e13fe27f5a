"""A model with an indexer in every layer, or in none, becomes an IndexShare model: all steps in order, each resumable.

OUTPUT-run/full           of a model without indexers: one in every layer, warmed up      (share distill)
OUTPUT-run/overlap.json   what the layers' choices have in common                          (share overlap)
OUTPUT-run/search         the pattern with the least loss                                  (share search)
OUTPUT-run/model          its indexers trained for the layers they serve                   (share distill)
OUTPUT                    that model, with report.html and report.json
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from indexshare import __version__, runtime
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import open_rows
from indexshare.engine.resolve import resolve_model
from indexshare.errors import CheckpointError, ConfigError
from indexshare.eval.progress import bar
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model
from indexshare.share.attach import default_sizes
from indexshare.share.calibration import CalibrationRow, PatternRunner, own_pattern
from indexshare.share.distill import REPORT_FILE, Distillation, HeldOutRows, IndexSizes, Schedule, distill_model
from indexshare.share.overlap import Overlap, measure_overlap
from indexshare.share.pictures import draw_overlap, draw_search
from indexshare.share.report import write_report
from indexshare.share.search import Method, PatternSearch, SearchResult, num_kept, uniform_pattern
from indexshare.share.state import write_json
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
    """What was made of which model, and what it lost. variants: from dense attention to the result, on rows that
    neither the search nor the training has seen. overlap: None for a single indexer."""

    model: str
    output: str
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

    keep, num_blocks, method: of the search, over num_rows rows. sizes, schedule: as in `distill_model`. Raises
    ConfigError for options, TrainingError for data and for a run that was stopped, CheckpointError for the model.
    """
    require_one_process("conversion")
    schedule = schedule or Schedule()
    if output.exists():
        raise ConfigError(f"{output} exists: name another directory")
    run = Path(f"{output}-run")
    source = resolve_model(model)
    _begin_or_go_on(
        run,
        {
            "model": os.fspath(source.resolve()),
            "sources": [os.path.abspath(path) for path in sources],
            "keep": keep,
            "blocks": num_blocks,
            "method": method,
            "rows": num_rows,
            "sizes": msgspec.to_builtins(sizes),
            "schedule": msgspec.to_builtins(schedule),
        },
    )
    full = _with_indexers(model, source, sources, run, keep=keep, sizes=sizes, schedule=schedule, device=device)
    length = schedule.length or 4 * GlmConfig.from_json(full).index_topk
    schedule = replace(schedule, length=length)
    data = HeldOutRows(
        open_rows(sources, Tokenizer.from_directory(source), length=length, seed=schedule.seed), schedule.held_out_rows
    )
    target = runtime.resolve_device(device)
    given = load_model(full, dtype=torch.float32, device=target, quant="none")
    # Not the rows that everything is measured on in the end: the pattern is chosen by these.
    calibration = tuple(CalibrationRow.from_batch(data.batch(index, 1), target) for index in range(num_rows))
    overlap = _overlap(given, calibration, run)
    with bar("search", "candidates") as report:
        found = PatternSearch(
            given,
            calibration,
            keep=keep,
            num_blocks=num_blocks,
            method=method,
            directory=run / "search",
            progress=report,
        ).search()
    draw_search(found, run / "search.png")
    distillation = _distill(str(full), sources, run, found.pattern, schedule, device)
    variants = _variants(given, data, found, distillation)
    result = Conversion(
        model=model,
        output=os.fspath(output),
        variants=variants,
        overlap=overlap,
        search=found,
        distillation=distillation,
    )
    made = run / "model"
    write_json(made / "report.json", result)
    write_report(result, run, made / "report.html")
    try:
        made.rename(output)
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error.strerror}; the same command tries again") from error
    return result


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


def _with_indexers(
    model: str,
    source: Path,
    sources: Sequence[str | os.PathLike[str]],
    run: Path,
    *,
    keep: str,
    sizes: IndexSizes | None,
    schedule: Schedule,
    device: str,
) -> Path:
    """A directory of the model with more indexers than are to be kept: a model without any gets one in every layer."""
    config = GlmConfig.from_json(source)
    if config.has_indexers:
        num_indexers = sum(config.is_full(layer) for layer in range(config.num_hidden_layers))
        if num_kept(keep, config.num_hidden_layers) >= num_indexers:
            raise ConfigError(f"{model} has {num_indexers} indexers in {config.num_hidden_layers} layers already")
        return source
    directory = run / "full"
    if not directory.is_dir():
        topk = (sizes.topk if sizes else None) or default_sizes(config)[2]
        warm_up = replace(schedule, sparse_steps=0, length=schedule.length or 4 * topk)
        pattern = "F" * config.num_hidden_layers
        distill_model(
            os.fspath(source), sources, directory, pattern=pattern, sizes=sizes, schedule=warm_up, device=device
        )
    return directory


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


def _distill(
    full: str, sources: Sequence[str | os.PathLike[str]], run: Path, pattern: str, schedule: Schedule, device: str
) -> Distillation:
    made = run / "model"
    if not made.exists():
        return distill_model(full, sources, made, pattern=pattern, schedule=schedule, device=device)
    return msgspec.json.decode((made / REPORT_FILE).read_bytes(), type=Distillation)


def _variants(
    model: GlmForCausalLM, data: HeldOutRows, found: SearchResult, distillation: Distillation
) -> tuple[Variant, ...]:
    """The losses on held-out rows: dense attention, the model as it was, with patterns, and trained for its pattern."""
    device = model.lm_head.weight.device
    runner = PatternRunner(model=model, rows=tuple(CalibrationRow.from_batch(row, device) for row in data.held_out()))
    own, per_layer = own_pattern(model), 2 * model.config.index_head_dim
    uniform = uniform_pattern(found.num_full, len(own))
    patterns = {"as it was": own, "equal spacing": uniform, "searched": found.pattern}
    if any(letter == "F" and there == "S" for letter, there in zip(uniform, own, strict=True)):
        del patterns["equal spacing"]
    dense = Variant(name="dense attention", pattern=None, loss=distillation.before.dense_loss, index_bytes=0)
    measured = [
        Variant(
            name=name,
            pattern=pattern,
            loss=runner.loss(runner.run(pattern)),
            index_bytes=pattern.count("F") * per_layer,
        )
        for name, pattern in patterns.items()
    ]
    trained = Variant(
        name="searched and distilled",
        pattern=found.pattern,
        loss=distillation.after.sparse_loss,
        index_bytes=found.num_full * per_layer,
    )
    return (dense, *measured, trained)
