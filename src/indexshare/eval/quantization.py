"""`indexshare quantize`: a checkpoint in, a smaller one out, and how much was lost beside how much was saved."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table

from indexshare import __version__, runtime
from indexshare.engine.llm import load
from indexshare.engine.resolve import resolve_config, resolve_model
from indexshare.errors import CheckpointError, RequestError
from indexshare.eval.progress import bar
from indexshare.eval.quality import Quality, compare
from indexshare.model.checkpoint_files import TEXT_FILES, check_text_files, find_tensors
from indexshare.model.weights import load_checkpoint, save_model
from indexshare.quant.policy import Policy

REPORT_FILE = "quantization.json"
# The first part that a name of a tensor contains is its class; MTP layers come before all.
PARTS = (
    (".experts.", "routed experts"),
    (".shared_experts.", "shared experts"),
    (".indexer.", "indexers"),
    ("norm", "norms"),
    (".self_attn.", "attention"),
    (".mlp.gate.", "routers"),
    (".mlp.", "dense feed-forward"),
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
)
MTP = "MTP layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSize:
    """Bytes of one kind of tensors in the files."""

    part: str
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What was done; `quality` is None when it was not measured."""

    model: str
    output: str
    format: str
    group_size: int
    keep: tuple[str, ...]
    indexshare: str
    parts: tuple[PartSize, ...]
    quality: Quality | None = None

    @property
    def before(self) -> int:
        return sum(part.before for part in self.parts)

    @property
    def after(self) -> int:
        return sum(part.after for part in self.parts)


def quantize_model(
    model: str,
    policy: Policy,
    *,
    output: Path | None = None,
    with_report: bool = True,
    max_tokens: int | None = None,
    num_documents: int = 2,
    device: str = "auto",
    threads: int | None = None,
) -> Quantization:
    """Write a quantised copy of a model and measure it; the copy is there, whole, before it is measured.

    output: a directory that does not exist or is empty, by default NAME-FORMAT here. The report needs memory for both
    models. max_tokens, num_documents: of the report, see `eval.quality`. Raises RequestError for an output that would
    be overwritten, and what loading and measuring raise; nothing stays half written.
    """
    runtime.set_threads(threads)
    name = os.path.basename(os.path.normpath(model))
    output = output or Path(f"{name}-{policy.format}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestError(f"{output} exists and is not overwritten: remove it or choose another --output")
    source = resolve_model(model)
    check_text_files(source)
    reference = load(source, device=device, quant="none", threads=threads) if with_report else None
    if reference is not None:
        _ = reference.tokenizer  # the report needs it; better now than after the work
    num_layers = _write(source, output, policy)
    result = Quantization(
        model=name,
        output=str(output),
        format=policy.format,
        group_size=policy.group_size if policy.format == "int4" else 0,
        keep=policy.keep,
        indexshare=__version__,
        parts=_sizes(source, output, num_layers),
    )
    _write_report(result, output)
    if reference is None:
        return result
    try:
        quantised = load(output, device=device, threads=threads)
        quality = compare(reference, quantised, max_tokens=max_tokens, num_documents=num_documents)
    except KeyboardInterrupt:
        sys.stderr.write(f"{output} is complete; only the report on its quality is missing\n")
        raise
    result = replace(result, quality=quality)
    _write_report(result, output)
    return result


def _write(source: Path, output: Path, policy: Policy) -> int:
    """Quantise into a directory beside `output` and move it there when it is complete; the number of main layers."""
    dtype = runtime.resolve_dtype(resolve_config(source).dtype)  # what is not quantised stays as it is
    with bar("quantising", "weights") as progress:
        model, _ = load_checkpoint(source, dtype=dtype, quant=policy, progress=progress)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".quantising-", dir=output.parent))
        try:
            for name in TEXT_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, staging / name)
            save_model(model, staging)
            staging.chmod(0o755)  # a temporary directory is its owner's alone
            staging.rename(output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint to {output}: {error}") from error
    return model.config.num_hidden_layers


def _sizes(source: Path, output: Path, num_layers: int) -> tuple[PartSize, ...]:
    """Bytes by kind of tensor, the largest first."""
    before, after = ({}, {})
    for directory, sizes in ((source, before), (output, after)):
        for name, tensor in find_tensors(directory).items():
            part = _part(name, num_layers)
            sizes[part] = sizes.get(part, 0) + tensor.num_bytes
    ordered = sorted(before, key=lambda part: -before[part])
    return tuple(PartSize(part=part, before=before[part], after=after[part]) for part in ordered)


def _part(name: str, num_layers: int) -> str:
    if name.startswith(f"model.layers.{num_layers}."):
        return MTP
    return next((part for text, part in PARTS if text in name), "other")


def _write_report(result: Quantization, output: Path) -> None:
    content = msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"
    try:
        staged = output / f".{REPORT_FILE}"
        staged.write_bytes(content)
        os.replace(staged, output / REPORT_FILE)
    except OSError as error:
        raise CheckpointError(f"cannot write {output / REPORT_FILE}: {error}") from error


def render(result: Quantization) -> RenderableType:
    """The sizes as a table, the quality as lines."""
    table = Table(title=f"{result.model} as {result.format}: bytes in the files", title_justify="left")
    table.add_column("part")
    for column in ("before", "after", "share left"):
        table.add_column(column, justify="right")
    for part in result.parts:
        table.add_row(part.part, f"{part.before:,}", f"{part.after:,}", f"{part.after / part.before:.0%}")
    table.add_section()
    table.add_row("total", f"{result.before:,}", f"{result.after:,}", f"{result.after / result.before:.0%}")
    return Group(table, *_quality_lines(result.quality), f"written to {result.output}")


def _quality_lines(quality: Quality | None) -> Sequence[str]:
    if quality is None:
        return ("quality: not measured (--no-report)",)
    text = quality.text
    lines = [
        f"against the original on {text.num_tokens:,} tokens of {text.num_files} held-out modules: "
        f"KL {text.kl_mean:.4f} nats a token (99 % below {text.kl_p99:.3f}), "
        f"same first choice {text.top1_agreement:.1%}",
        f"bits per byte: {text.reference_bits_per_byte:.3f} before, {text.bits_per_byte:.3f} after",
    ]
    lines += [
        f"retrieval at {row.num_tokens:,} tokens: {row.reference_correct} of {row.num_questions} before, "
        f"{row.num_correct} after"
        for row in quality.retrieval
    ]
    return lines
