"""Does a model fit on this machine at a context length, and what will be slow? From configuration and machine alone.

Sizes are exact. Speeds are bounds from bytes and FLOP under the stated assumptions, not measurements.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from indexshare import runtime
from indexshare.errors import ConfigError
from indexshare.kernels.cache_formats import PLAIN, CacheFormats
from indexshare.model.config import GlmConfig
from indexshare.model.inspect import activated_parameters, cache_bytes_per_token, token_work, weight_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

# format of the weights -> bytes of one cached number
FORMATS = {"float32": 4, "bfloat16": 2, "fp8": 2, "int8": 2, "int4": 2}
PREFILL_CHUNK = 512  # tokens that share one pass over the weights
INTERPRETER_BYTES = 400 * runtime.MIB  # Python and torch, measured with the CPU build


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the plan assumes of a machine. Bandwidth in bytes/s, compute in FLOP/s (BF16; float32 has half)."""

    description: str
    memory_bytes: int
    disk_bytes: int
    bandwidth: float
    compute: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatPlan:
    """One weight format: bytes needed, whether they fit, and bounds on speed once everything is in memory."""

    weight_format: str
    weight_bytes: int
    cache_bytes: int
    needed_bytes: int
    fits_memory: bool
    fits_disk: bool
    prefill_seconds: float
    decode_tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer to `indexshare plan`. on_disk: the weights are on this machine's disk already."""

    model: str
    context: int
    on_disk: bool
    machine: Machine
    workspace_bytes: int
    formats: tuple[FormatPlan, ...]
    verdict: str
    notes: tuple[str, ...]


def this_machine(device: str = "cpu", directory: Path | str = ".") -> Machine:
    """Free memory of the device and disk of the directory as they are now; speeds as assumed for the kind of device.

    device: cpu, or a name for `runtime.resolve_device`, which is cpu or cuda. directory: for one that is yet to be
    made, the nearest one above it counts. Raises ConfigError.
    """
    if device != "cpu":  # the plan for a CPU needs no torch, which takes seconds to import
        device = str(runtime.resolve_device(device))
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"no memory figure is known for device {device!r}; plan for cpu or a cuda device")
    place = Path(directory).absolute()
    num_cpus = runtime.num_usable_cpus()
    if kind == "cuda":
        description, bandwidth, compute = f"{device}, assumed 1,500 GB/s and 150 TFLOP/s", 1.5e12, 1.5e14
    else:
        bandwidth, compute = min(10e9 * num_cpus, 80e9), 100e9 * num_cpus
        description = (
            f"{num_cpus} CPUs, assumed {bandwidth / 1e9:.0f} GB/s and {compute / 1e9:,.0f} GFLOP/s "
            "(10 GB/s and 100 GFLOP/s in BF16 for each CPU, at most 80 GB/s)"
        )
    return Machine(
        description=description,
        memory_bytes=runtime.available_memory_bytes(device),
        disk_bytes=shutil.disk_usage(next(each for each in (place, *place.parents) if each.exists())).free,
        bandwidth=bandwidth,
        compute=compute,
    )


def make_plan(
    config: GlmConfig,
    name: str,
    context: int,
    machine: Machine,
    *,
    on_disk: bool = False,
    caches: CacheFormats = PLAIN,
) -> Plan:
    """Sizes, bounds and a verdict for one sequence of `context` tokens. Raises ConfigError for an impossible length.

    on_disk: the weights need no room on the disk, because they are there. caches: which of them are rounded.
    """
    if not 1 <= context <= config.max_position_embeddings:
        raise ConfigError(f"context must be between 1 and {config.max_position_embeddings:,}, not {context:,}")
    workspace = runtime.settings().workspace_bytes
    formats = tuple(_plan_format(config, each, context, machine, workspace, on_disk, caches) for each in FORMATS)
    return Plan(
        model=name,
        context=context,
        on_disk=on_disk,
        machine=machine,
        workspace_bytes=workspace,
        formats=formats,
        verdict=_verdict(formats, machine),
        notes=_notes(config, context),
    )


def _plan_format(
    config: GlmConfig,
    weight_format: str,
    context: int,
    machine: Machine,
    workspace: int,
    on_disk: bool,
    caches: CacheFormats,
) -> FormatPlan:
    weights = weight_bytes(config, weight_format)
    latent, index, mtp = cache_bytes_per_token(config, FORMATS[weight_format], caches)
    cache = (latent + index + mtp) * context
    needed = weights + cache + workspace + INTERPRETER_BYTES
    # one token reads its share of the weights, the selected latents, and the index keys of all tokens
    read = activated_parameters(config) * weights / weight_bytes(config, "bfloat16") * 2
    read += latent * config.num_attended(context) + index * context
    work = token_work(config, context)
    compute = machine.compute / 2 if weight_format == "float32" else machine.compute
    seconds_per_token = max(read / machine.bandwidth, work.total / compute)
    # in a prefill a token sees on average half of the context, and a chunk of tokens reads all weights once
    average = work.weights + work.indexer / 2 + work.sparse_attention
    chunks = -(-context // PREFILL_CHUNK)
    prefill = max(context * average / compute, chunks * weights / machine.bandwidth)
    return FormatPlan(
        weight_format=weight_format,
        weight_bytes=weights,
        cache_bytes=cache,
        needed_bytes=needed,
        fits_memory=needed <= machine.memory_bytes,
        fits_disk=on_disk or weights <= machine.disk_bytes,
        prefill_seconds=prefill,
        decode_tokens_per_second=1 / seconds_per_token,
    )


def _verdict(formats: tuple[FormatPlan, ...], machine: Machine) -> str:
    fitting = [plan.weight_format for plan in formats if plan.fits_memory]
    if fitting:
        return f"fits in {' and '.join(fitting)}"
    smallest = min(formats, key=lambda plan: plan.needed_bytes)
    missing = smallest.needed_bytes - machine.memory_bytes
    return f"does not fit: {smallest.weight_format} needs {_size(missing)} more memory than is free"


def _notes(config: GlmConfig, context: int) -> tuple[str, ...]:
    work = token_work(config, context)
    attention = "sparse attention" if config.has_indexers else "dense attention"
    shares = {"weights": work.weights, "indexer": work.indexer, attention: work.sparse_attention}
    slowest = max(shares, key=lambda name: shares[name])
    notes = [f"most work of a decoded token at this length: {slowest}, {shares[slowest] / work.total:.0%}"]
    if slowest == "indexer":
        in_every_layer = work.weights + work.sparse_attention + work.indexer_in_every_layer
        notes.append(f"an indexer in every layer would be {in_every_layer / work.total:.1f} times the work")
    if context <= config.index_topk:
        notes.append(f"every token is selected up to index_topk = {config.index_topk:,}: this is dense attention")
    if config.quantization is None:
        notes.append("fp8: an FP8 checkpoint as it is; int8 and int4: with --quant, or from `indexshare quantize`")
    else:
        notes.append(
            "these files are quantised: they run as they are, --quant none widens them, the other rows need others"
        )
    notes.append("speeds are estimates from bytes and FLOP under the assumptions above, not measurements")
    return tuple(notes)


def render(plan: Plan) -> RenderableType:
    """The plan as a rich table with the verdict under it."""
    from rich.console import Group
    from rich.table import Table

    title = f"{plan.model} at {plan.context:,} tokens"
    table = Table(title=title, title_justify="left", pad_edge=False)  # 80 columns hold every size and speed
    table.add_column("format", no_wrap=True)
    for column in ("weights", "cache", "needed", "memory", "disk", "prefill", "decode"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in plan.formats:
        speed = row.decode_tokens_per_second
        table.add_row(
            row.weight_format,
            _size(row.weight_bytes),
            _size(row.cache_bytes),
            _size(row.needed_bytes),
            "fits" if row.fits_memory else "no",
            "on disk" if plan.on_disk else "fits" if row.fits_disk else "no",
            _duration(row.prefill_seconds),
            f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.2g}/s",
        )
    machine = plan.machine
    return Group(
        table,
        f"verdict: {plan.verdict}",
        f"free: {_size(machine.memory_bytes)} memory, {_size(machine.disk_bytes)} disk; {machine.description}",
        f"needed = weights + cache + {_size(plan.workspace_bytes)} workspace + {_size(INTERPRETER_BYTES)} for torch",
        *plan.notes,
    )


def _size(num_bytes: int) -> str:
    amount, unit = num_bytes / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.2g} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"
