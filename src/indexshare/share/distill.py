"""Multi-layer distillation (IndexCache, arXiv 2603.12201, section 3.2): indexers learn the layers they serve.

Two runs of the training loop: a warm-up with dense attention, in which only indexers move, and a sparse stage, in which
attention sees the chosen keys, the indexers go on over these, and everything else learns from the language-model loss.

    OUTPUT-run/warm-up, OUTPUT-run/sparse    checkpoints and logs, while it runs; the logs stay
    OUTPUT-run/unfinished                    the model while it is written
    OUTPUT                                   the model and distillation.json, when all is done
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from indexshare import __version__, runtime
from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.resolve import resolve_model
from indexshare.errors import ConfigError, MemoryLimitError, TrainingError
from indexshare.eval.progress import bar
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model
from indexshare.share.attach import attach_indexers, pattern_of_frequency, with_indexers
from indexshare.share.calibration import weights_fingerprint
from indexshare.share.index_quality import LAYER_COLUMNS, IndexQuality, layer_cells, measure_indexers
from indexshare.share.split import Split, split_rows
from indexshare.share.state import output_directory, write_json, writing
from indexshare.train.distributed import require_one_process
from indexshare.train.export import export_model
from indexshare.train.loop import train
from indexshare.train.optim import is_muon
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.recipes import phase_loss

REPORT_FILE = "distillation.json"
MTP_WEIGHT = 0.1  # of GLM-5 after its first 15T tokens


class StoppedError(TrainingError):
    """A signal ended training, with a checkpoint. The message says where, and that the same command goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Lengths and rates of both stages.

    The numbers of steps are IndexCache's. Rates are GLM-5's (arXiv 2602.15763): that of the warm-up falls from 5e-3 to
    2e-4, that of the sparse stage is constant. length: tokens in a row, by default 4 * index_topk. stride: indexers
    learn from every so manyth token. only_indexers: the rest of the model stays frozen in the sparse stage too.
    """

    warmup_steps: int = 1000
    sparse_steps: int = 4000
    length: int | None = None
    batch_size: int = 8
    warmup_rate: float = 5e-3
    warmup_end_rate: float = 2e-4
    sparse_rate: float = 1e-5
    stride: int = 1
    only_indexers: bool = False
    held_out_rows: int = 8
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "stride", "held_out_rows", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if (self.length is not None and self.length < 2) or self.seed < 0:
            raise ConfigError(f"length must be at least 2 and seed at least 0, not {self.length} and {self.seed}")
        if min(self.warmup_steps, self.sparse_steps) < 0 or self.warmup_steps + self.sparse_steps == 0:
            raise ConfigError("give at least one step, of the warm-up or of the sparse stage")
        if not 0 < self.warmup_end_rate <= self.warmup_rate or not self.sparse_rate > 0:
            raise ConfigError("rates must be above 0, and the warm-up's not higher at its end than at its start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What was done, and the indexers on held-out rows, of which `schedule` has the number, before and after it."""

    model: str
    output: str
    pattern: str
    schedule: Schedule
    num_tokens: int
    before: IndexQuality
    after: IndexQuality
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSizes:
    """Sizes of new indexers; None is the default of `with_indexers`."""

    num_heads: int | None = None
    head_dim: int | None = None
    topk: int | None = None

    def given(self) -> dict[str, int | None]:
        """As keyword arguments of `with_indexers` and `attach_indexers`."""
        return {"num_heads": self.num_heads, "head_dim": self.head_dim, "topk": self.topk}


def distill_model(
    model: str,
    sources: Sequence[str | os.PathLike[str]],
    output: Path,
    *,
    pattern: str | None = None,
    freq: int | None = None,
    sizes: IndexSizes | None = None,
    schedule: Schedule | None = None,
    calibration_rows: int = 0,
    device: str = "auto",
) -> Distillation:
    """Give a model the pattern, train its indexers, write it to `output`. What was stopped goes on when called again.

    sources: as in `open_rows`. pattern, or freq for equal spacing. calibration_rows: of the data, set aside as in
    `split_rows`. Raises ConfigError for options and an output that cannot be written, TrainingError for data,
    StoppedError when a signal ended it, CheckpointError for the model, MemoryLimitError when it does not fit.
    """
    require_one_process("distillation")
    schedule = schedule or Schedule()
    if (pattern is None) == (freq is None):
        raise ConfigError("give either a pattern of F and S, one letter a layer, or a frequency")
    run = Path(f"{output}-run")
    if output.exists():
        raise ConfigError(f"{output} exists: name another directory")
    with output_directory(run):
        source = resolve_model(model)
        given = GlmConfig.from_json(source)
        if pattern is None:
            assert freq is not None, "one of them was given"
            pattern = pattern_of_frequency(given, freq)
        new = (sizes or IndexSizes()).given()
        config = with_indexers(given, pattern, **new)
        target = runtime.resolve_device(device)
        check_memory(config, schedule, str(target))
        length = schedule.length or 4 * config.index_topk
        data = split_rows(
            sources,
            Tokenizer.from_directory(source),
            length=length,
            num_held_out=schedule.held_out_rows,
            num_calibration=calibration_rows,
            seed=schedule.seed,
        )
        loaded = load_model(source, dtype=torch.float32, device=target, quant="none")
        identity = {"data": data.fingerprint, "weights": weights_fingerprint(loaded)}
        student = attach_indexers(loaded, pattern, **new, seed=schedule.seed)
        before = _measure(student, data, schedule)
        num_tokens = _train(student, data, schedule, length, run, identity)
        _round(student)
        result = Distillation(
            model=model,
            output=os.fspath(output),
            pattern=pattern,
            schedule=replace(schedule, held_out_rows=len(data.held_out)),
            num_tokens=num_tokens,
            before=before,
            after=_measure(student, data, schedule),
            version=__version__,
        )
        _write(student, source, result, run / "unfinished", output)
        for stage in run.iterdir():
            shutil.rmtree(stage / "checkpoints", ignore_errors=True)
    return result


def check_memory(config: GlmConfig, schedule: Schedule, device: str) -> None:
    """Raises MemoryLimitError when weights, gradients and what the optimizers keep, all in fp32, do not fit."""
    only_indexers = schedule.only_indexers or schedule.sparse_steps == 0
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    needed = 0
    for name, parameter in model.named_parameters():
        is_trained = ".indexer." in name or not only_indexers
        # the weight, its gradient, and one buffer of Muon or two of AdamW
        needed += parameter.numel() * 4 * (1 + is_trained * (2 if is_muon(name, parameter) else 3))
    available = runtime.available_memory_bytes(device)
    if needed > available:
        raise MemoryLimitError(
            f"distillation runs in one process, whose weights, gradients and optimizers take {needed:,} bytes, and"
            f" {available:,} are available on {device}: take a larger machine, or leave all but the indexers as they"
            " are with --only-indexers, which takes a third"
        )


def stages(model: GlmForCausalLM, schedule: Schedule, length: int) -> tuple[TrainRecipe, ...]:
    """The recipes of the two runs, without those of no steps."""
    common = {"sequence_length": length, "batch_size": schedule.batch_size, "index_stride": schedule.stride}
    warm_up = Phase(
        name="warm-up",
        num_steps=schedule.warmup_steps,
        attention="dense",
        trains="indexer",
        index_loss_weight=1.0,
        index_target="visible",
        **common,
    )
    sparse = Phase(
        name="sparse",
        num_steps=schedule.sparse_steps,
        attention="sparse",
        trains="indexer" if schedule.only_indexers else "all",
        index_loss_weight=1.0,
        mtp_loss_weight=MTP_WEIGHT if model.mtp_stack is not None and not schedule.only_indexers else 0.0,
        index_target="selected",
        **common,
    )
    rates = {"warm-up": (schedule.warmup_rate, schedule.warmup_end_rate), "sparse": (schedule.sparse_rate,) * 2}
    return tuple(
        TrainRecipe(
            name=phase.name,
            model=model.config,
            phases=(phase,),
            seed=schedule.seed,
            learning_rate_muon=rates[phase.name][0],
            learning_rate_adamw=rates[phase.name][0],
            warmup_steps=min(phase.num_steps // 10, 50),
            min_lr_ratio=rates[phase.name][1] / rates[phase.name][0],
            bias_update_rate=0.0,  # the router of a trained model is balanced
            precision="bf16" if model.lm_head.weight.device.type == "cuda" else "fp32",
            checkpoint_every=schedule.checkpoint_every,
        )
        for phase in (warm_up, sparse)
        if phase.num_steps
    )


def _train(
    model: GlmForCausalLM, data: Split, schedule: Schedule, length: int, run: Path, identity: dict[str, str]
) -> int:
    """Both stages in place; the number of supervised tokens. Raises StoppedError when a signal ended one.

    identity: of what is trained on, so that a run does not go on with another model or other data.
    """
    first_step = num_tokens = 0
    for recipe in stages(model, schedule, length):
        result = train(
            replace(recipe, data=dict(identity)),
            run / recipe.name,
            model=model,
            batches=lambda step, first=first_step: data.training.batch(first + step, schedule.batch_size),
            step_loss=phase_loss(),
            progress=not _is_finished(run, recipe),
        )
        if result.step < recipe.num_steps:
            raise StoppedError(
                f"stopped ({result.stopped}) at step {result.step:,} of {recipe.num_steps:,} of the {recipe.name} stage"
                f", checkpoint in {run}; the same command goes on"
            )
        first_step += recipe.num_steps
        num_tokens += result.num_tokens
    return num_tokens


def _is_finished(run: Path, recipe: TrainRecipe) -> bool:
    return (run / recipe.name / "checkpoints" / f"step-{recipe.num_steps:08d}").is_dir()


def _measure(model: GlmForCausalLM, data: Split, schedule: Schedule) -> IndexQuality:
    with bar("measuring", "rows") as report:
        return measure_indexers(model, data.held_out, stride=schedule.stride, report=report)


@torch.no_grad()
def _round(model: GlmForCausalLM) -> None:
    """To the numbers that `export_model` writes, still as fp32."""
    for name, parameter in model.named_parameters():
        if not name.endswith("e_score_correction_bias"):
            parameter.copy_(parameter.bfloat16())


def _write(model: GlmForCausalLM, source: Path, result: Distillation, staging: Path, output: Path) -> None:
    """The model and what was measured, whole or not at all; what a killed process left of it goes first."""
    with writing(output):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            export_model(model, source, staging)
            write_json(staging / REPORT_FILE, result)
            staging.rename(output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def render(result: Distillation) -> RenderableType:
    """A table of layers, and the loss before and after."""
    table = Table(*LAYER_COLUMNS, title=result.pattern)
    for cells in layer_cells(result.before, result.after):
        table.add_row(*cells)
    lines = [
        f"loss with {what} keys: {before:.4f} nats a token before, {after:.4f} after"
        for what, before, after in (
            ("all", result.before.dense_loss, result.after.dense_loss),
            ("chosen", result.before.sparse_loss, result.after.sparse_loss),
        )
    ]
    return Group(table, *lines, f"{result.num_tokens:,} tokens; written to {result.output}")
