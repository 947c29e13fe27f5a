"""Multi-layer distillation (IndexCache, arXiv 2603.12201, section 3.2): indexers learn the layers they serve.

Two runs of the training loop: a warm-up with dense attention, in which only indexers move, and a sparse stage, in which
attention sees the chosen keys, the indexers go on over these, and everything else learns from the language-model loss.

    OUTPUT-run/warm-up, OUTPUT-run/sparse    checkpoints and logs, while it runs; the logs stay
    OUTPUT                                   the model and distillation.json, when all is done
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table

from indexshare import __version__, runtime
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import Batch, TokenRows, open_rows
from indexshare.engine.resolve import resolve_model
from indexshare.errors import CheckpointError, ConfigError, TrainingError
from indexshare.eval.progress import bar
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model
from indexshare.share.attach import attach_indexers, pattern_of_frequency
from indexshare.share.index_quality import IndexQuality, measure_indexers
from indexshare.share.state import write_json
from indexshare.train.distributed import require_one_process
from indexshare.train.export import export_model
from indexshare.train.loop import train
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.recipes import phase_loss

REPORT_FILE = "distillation.json"
MTP_WEIGHT = 0.1  # of GLM-5 after its first 15T tokens


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
        if min(self.warmup_steps, self.sparse_steps) < 0 or self.warmup_steps + self.sparse_steps == 0:
            raise ConfigError("give at least one step, of the warm-up or of the sparse stage")
        if not 0 < self.warmup_end_rate <= self.warmup_rate or not self.sparse_rate > 0:
            raise ConfigError("rates must be above 0, and the warm-up's not higher at its end than at its start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What was done, and the indexers on held-out rows before and after it."""

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
    """Sizes of new indexers; None is the default of `attach_indexers`."""

    num_heads: int | None = None
    head_dim: int | None = None
    topk: int | None = None


def distill_model(
    model: str,
    sources: Sequence[str | os.PathLike[str]],
    output: Path,
    *,
    pattern: str | None = None,
    freq: int | None = None,
    sizes: IndexSizes | None = None,
    schedule: Schedule | None = None,
    device: str = "auto",
) -> Distillation:
    """Give a model the pattern, train its indexers, write it to `output`. What was stopped goes on when called again.

    sources: as in `open_rows`. pattern, or freq for equal spacing. Raises ConfigError for options, TrainingError for
    data and for a run that was stopped (it says so), CheckpointError for the model.
    """
    require_one_process("distillation")
    schedule = schedule or Schedule()
    if (pattern is None) == (freq is None):
        raise ConfigError("give either a pattern of F and S, one letter a layer, or a frequency")
    run = Path(f"{output}-run")
    if output.exists():
        raise ConfigError(f"{output} exists: name another directory")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {run}: {error.strerror}. Name another output directory") from error
    source = resolve_model(model)
    target = runtime.resolve_device(device)
    given = load_model(source, dtype=torch.float32, device=target, quant="none")
    if pattern is None:
        assert freq is not None, "one of them was given"
        pattern = pattern_of_frequency(given.config, freq)
    sizes = sizes or IndexSizes()
    student = attach_indexers(
        given, pattern, num_heads=sizes.num_heads, head_dim=sizes.head_dim, topk=sizes.topk, seed=schedule.seed
    )
    length = schedule.length or 4 * student.config.index_topk
    rows = open_rows(sources, Tokenizer.from_directory(source), length=length, seed=schedule.seed)
    data = HeldOutRows(rows, schedule.held_out_rows)
    before = _measure(student, data, schedule)
    num_tokens = _train(student, data, schedule, length, run, os.fspath(source))
    with _staged(output) as staging:
        export_model(student, source, staging)
        result = Distillation(
            model=model,
            output=os.fspath(output),
            pattern=pattern,
            schedule=schedule,
            num_tokens=num_tokens,
            before=before,
            after=_measure(student.float(), data, schedule),  # the weights as they were rounded
            version=__version__,
        )
        write_json(staging / REPORT_FILE, result)
    for stage in run.iterdir():
        shutil.rmtree(stage / "checkpoints", ignore_errors=True)
    return result


class HeldOutRows:
    """Rows of a data set: the first few of its random order to measure on, the others, again and again, to train on."""

    def __init__(self, rows: TokenRows, num_held_out: int) -> None:
        """Raises TrainingError when nothing would be left to train on."""
        if rows.num_rows <= num_held_out:
            raise TrainingError(
                f"the data fill {rows.num_rows:,} rows of {rows.length:,} tokens, {num_held_out:,} are to measure on:"
                " give more data, or shorter rows with --length"
            )
        self._rows, self._num_held_out = rows, num_held_out

    def held_out(self) -> list[Batch]:
        """One batch for each row."""
        return [self._rows.batch(index, 1) for index in range(self._num_held_out)]

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of step `step`, a pure function of it."""
        num_left = self._rows.num_rows - self._num_held_out
        places = (self._num_held_out + (step * batch_size + index) % num_left for index in range(batch_size))
        return join_batches([self._rows.batch(place, 1) for place in places])

    def fingerprint(self) -> str:
        """Of the rows to measure on: other data, another tokenizer or another seed give another one."""
        digest = hashlib.sha256(str(self._rows.num_rows).encode())
        for batch in self.held_out():
            digest.update(batch.token_ids.tobytes())
        return digest.hexdigest()[:16]


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Batches of rows of one length as a batch of all their rows."""
    starts, offset = [0], 0
    for batch in batches:
        starts += [offset + start for start in batch.segment_starts[1:]]
        offset = starts[-1]
    return Batch(
        token_ids=np.concatenate([batch.token_ids for batch in batches]),
        targets=np.concatenate([batch.targets for batch in batches]),
        loss_weights=np.concatenate([batch.loss_weights for batch in batches]),
        positions=np.concatenate([batch.positions for batch in batches]),
        segment_starts=tuple(starts),
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


def _train(model: GlmForCausalLM, data: HeldOutRows, schedule: Schedule, length: int, run: Path, source: str) -> int:
    """Both stages in place; the number of supervised tokens. Raises TrainingError when a signal ended one."""
    first_step = num_tokens = 0
    identity = {"data": data.fingerprint(), "source": source}
    for recipe in stages(model, schedule, length):
        recipe = _with_data(recipe, identity)
        result = train(
            recipe,
            run / recipe.name,
            model=model,
            batches=_batches(data, first_step, schedule.batch_size),
            step_loss=phase_loss(),
            progress=not _is_finished(run, recipe),
        )
        if result.step < recipe.num_steps:
            raise TrainingError(
                f"stopped in the {recipe.name} stage at step {result.step:,} of {recipe.num_steps:,}, with a checkpoint"
                f" in {run}: the same command goes on there"
            )
        first_step += recipe.num_steps
        num_tokens += result.num_tokens
    return num_tokens


def _with_data(recipe: TrainRecipe, identity: dict[str, str]) -> TrainRecipe:
    """The recipe with what it is trained on, so that a run does not go on with another model or other data."""
    return replace(recipe, data=dict(identity))


def _batches(data: HeldOutRows, first_step: int, batch_size: int) -> Callable[[int], Batch]:
    return lambda step: data.batch(first_step + step, batch_size)


def _is_finished(run: Path, recipe: TrainRecipe) -> bool:
    return (run / recipe.name / "checkpoints" / f"step-{recipe.num_steps:08d}").is_dir()


def _measure(model: GlmForCausalLM, data: HeldOutRows, schedule: Schedule) -> IndexQuality:
    with bar("measuring", "rows") as report:
        return measure_indexers(model, data.held_out(), stride=schedule.stride, report=report)


@contextmanager
def _staged(output: Path) -> Generator[Path]:
    """A directory to fill, which becomes `output` when the block ends well."""
    staging = Path(tempfile.mkdtemp(prefix=".distilling-", dir=output.parent))
    try:
        yield staging
        staging.chmod(0o755)  # a temporary directory is its owner's alone
        staging.rename(output)
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error}; the same command tries again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def render(result: Distillation) -> RenderableType:
    """A table of layers, and the loss before and after."""
    table = Table("layer", "indexer", "KL before", "after", "recall before", "after", title=result.pattern)
    for old, new in zip(result.before.layers, result.after.layers, strict=True):
        own = "own" if old.layer == old.indexer else f"of layer {old.indexer}"
        recalls = (f"{old.recall:.1%}", f"{new.recall:.1%}")
        table.add_row(str(old.layer), own, f"{old.kl:.4f}", f"{new.kl:.4f}", *recalls)
    lines = [
        f"loss with {what} keys: {before:.4f} nats a token before, {after:.4f} after"
        for what, before, after in (
            ("all", result.before.dense_loss, result.after.dense_loss),
            ("chosen", result.before.sparse_loss, result.after.sparse_loss),
        )
    ]
    return Group(table, *lines, f"{result.num_tokens:,} tokens; written to {result.output}")
