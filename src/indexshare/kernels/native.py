"""The C++ twins: compiled on this machine at first use, kept in the user's cache, registered beside the specifications.

    cpp/*.h           the arithmetic, one source for every instruction set, on torch's threads (docs/kernels.md)
    cpp/native.cpp    torch operators (LibTorch Stable ABI)

`enable()` does all of it once per process. Without a compiler, or when the build fails, the specifications run, one
warning says why, and so does `indexshare kernels`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from indexshare import runtime
from indexshare.errors import ConfigError, KernelError
from indexshare.kernels import ops, registry
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.packed import LANES, PackedWeight
from indexshare.kernels.pool import Pool, QuantizedPool

NAME = "c++"
SOURCES = Path(__file__).parent / "cpp"
BUILD_SECONDS = 300  # 15 on a quiet machine
LOCK_SECONDS = 330
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
# The stable ABI of torch 2.10: a library built today runs with later versions.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
LIBRARIES = ("-ltorch_cpu", "-ltorch", "-lc10")
# Best first: what the processor must have, and the compiler's flags for it.
INSTRUCTION_SETS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512": (  # AMD from Zen 4, Intel from Sapphire Rapids
        frozenset(f"avx512{part}" for part in ("f", "bw", "dq", "vl", "vbmi", "_bf16", "_vnni")) | {"fma"},
        (*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vbmi", "bf16", "vnni")), "-mavx2", "-mfma"),
    ),
    "avx2": (frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
    "scalar": (frozenset(), ()),
}


@functools.cache
def enable() -> str | None:
    """Builds or finds the library and registers its twins; once per process. Returns why not, or None when they run."""
    try:
        register(instruction_set())
    except KernelError as error:
        registry.explain("cpu", str(error))
        warnings.warn(f"the C++ kernels are not used: {error}", stacklevel=2)
        return str(error)
    return None


def register(isa: str) -> None:
    """Adds the twins of one instruction set. Raises KernelError when they cannot be built or loaded."""
    operators = load(isa)
    name = NAME if isa == instruction_set() else f"{NAME} {isa}"
    for operation, make_twin in TWINS.items():
        registry.register(operation, make_twin(name, operators))


def instruction_set() -> str:
    """`INDEXSHARE_ISA`, or the best this processor has. Raises ConfigError for one that it lacks."""
    asked, runs = runtime.settings().isa, runnable()
    if asked is None:
        return runs[0]
    if asked not in runs:
        raise ConfigError(f"INDEXSHARE_ISA={asked} does not run on this processor; it can run: {', '.join(runs)}")
    return asked


def runnable() -> list[str]:
    """The instruction sets that this processor has, best first."""
    flags = _processor_flags()
    return [name for name, (needed, _) in INSTRUCTION_SETS.items() if needed <= flags]


@functools.cache
def _processor_flags() -> frozenset[str]:
    information = Path("/proc/cpuinfo")
    if platform.machine().lower() not in ("x86_64", "amd64") or not information.exists():
        return frozenset()  # "scalar" is what the compiler makes of it: NEON on ARM
    line = next((line for line in information.read_text().splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


# ---------------------------------------------------------------------------------------------------------------- build


@functools.cache
def load(isa: str) -> Any:
    """The torch operators of an instruction set, built first if need be. Raises KernelError."""
    library = build(isa)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise KernelError(f"{library} was built but cannot be loaded: {error}") from None
    return getattr(torch.ops, f"indexshare_{isa}")


def build(isa: str) -> Path:
    """The path of the library for an instruction set: from the cache, or compiled into it under a lock.

    Raises KernelError when there is no compiler, when it fails, or when others could write to the cache.
    """
    compiler = _compiler()
    cache = runtime.settings().cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "indexshare")
    key = hashlib.sha256()
    for part in (isa, torch.__version__, platform.machine(), _version(compiler), *FLAGS, *INSTRUCTION_SETS[isa][1]):
        key.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    name = f"kernels-{isa}-{key.hexdigest()[:16]}.so"
    directory = _writable(cache)
    if directory != cache and os.path.exists(cache / name) and not (_distrust(cache) or _distrust(cache / name)):
        return cache / name
    library = directory / name
    for place in (directory, library):
        if reason := _distrust(place):
            raise KernelError(f"{place} {reason}; remove it, or set INDEXSHARE_CACHE to another directory")
    if library.exists():
        return library
    try:
        with FileLock(directory / f"{library.stem}.lock", timeout=LOCK_SECONDS):
            if not library.exists():
                _compile(compiler, isa, library)
    except Timeout:
        raise KernelError(f"another process has been compiling in {directory} for {LOCK_SECONDS} seconds") from None
    return library


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise KernelError(f"there is no C++ compiler ({asked or 'c++, g++ or clang++'}); install one, or set CXX")


def _version(compiler: str) -> str:
    try:
        command = [compiler, "--version"]
        # S603: the compiler that this machine has or the user names, no shell in between.
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{compiler} --version failed: {error}") from None


def _writable(cache: Path) -> Path:
    """The cache, made for this user alone, or a directory for this process only where it cannot be written."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cache if os.access(cache, os.W_OK | os.X_OK) else _temporary_directory()
    except OSError:
        return _temporary_directory()


def _distrust(place: Path) -> str | None:
    """Why a library, or what is in a directory, must not be executed: others than this user and root could write it."""
    try:
        status = place.stat()
    except OSError:
        return None  # there is nothing
    if status.st_uid not in (os.getuid(), 0):
        return "belongs to another user"
    return "can be written by other users" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


@functools.cache
def _temporary_directory() -> Path:
    """Removed when this process ends."""
    import atexit

    directory = tempfile.mkdtemp(prefix="indexshare-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _compile(compiler: str, isa: str, library: Path) -> None:
    root = Path(torch.__file__).parent
    partial = library.with_suffix(f".{os.getpid()}.partial")
    command = [compiler, *FLAGS, *INSTRUCTION_SETS[isa][1], TARGET, f"-DINDEXSHARE_OPERATORS=indexshare_{isa}"]
    command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", str(SOURCES / "native.cpp")]
    command += ["-o", str(partial), f"-L{root / 'lib'}", *LIBRARIES]
    begin, outcome = time.perf_counter(), "failed"
    sys.stderr.write(f"compiling the {isa} kernels, once for this machine: ")
    sys.stderr.flush()
    try:
        status, said = _run_bounded(command)
        if status != 0:
            errors = [line for line in said.splitlines() if "error" in line] or said.splitlines()[-1:]
            raise KernelError(f"{compiler} failed: {' '.join(errors[:1]) or f'exit status {status}'}")
        partial.chmod(0o700)
        os.replace(partial, library)
        outcome = f"{time.perf_counter() - begin:.0f} s, kept in {library.parent}"
    except subprocess.TimeoutExpired:
        raise KernelError(f"{compiler} took more than {BUILD_SECONDS} seconds") from None
    except OSError as error:
        raise KernelError(f"the kernels could not be built in {library.parent}: {error}") from None
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        partial.unlink(missing_ok=True)
        sys.stderr.write(f"{outcome}\n")


def _run_bounded(command: list[str]) -> tuple[int, str]:
    """Exit status and errors of a compiler; it is ended with its children when it takes too long or we are stopped."""
    process = subprocess.Popen(  # noqa: S603 - the compiler that this machine has or the user names
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=BUILD_SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, said


# ---------------------------------------------------------------------------------------------------------------- twins

FLOATS = "BF16 and fp32, without gradients"
PACKED = "packed weights, which `load` makes on a CPU"
_FLOATS = (torch.bfloat16, torch.float32)


def _refusal(*tensors: Tensor) -> str | None:
    """What all twins need: BF16 or fp32 on a CPU, and no gradients."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device.type}"
        if tensor.dtype not in _FLOATS:
            return f"a tensor is {tensor.dtype}; the C++ kernels read bfloat16 and float32"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "gradients are wanted"
        if not tensor.is_contiguous():
            return "a tensor is not contiguous"
    return None


def _pool_refusal(pool: Pool) -> str | None:
    """The same for a pool, which may hold int8."""
    if not isinstance(pool, QuantizedPool):
        return _refusal(pool)
    if pool.device.type != "cpu" or not pool.data.is_contiguous():
        return f"a pool is on {pool.device}, or not contiguous"
    return None


def _bytes(pool: Pool) -> Tensor:
    return pool.data if isinstance(pool, QuantizedPool) else pool


def _index_select_twin(name: str, operators: Any) -> registry.Twin:
    no_pages = torch.empty(0, dtype=torch.int64)

    def supports(query: Tensor, weights: Tensor, keys: Pool, layout: KeyLayout, topk: int) -> str | None:
        if weights.dtype != torch.float32:
            return f"the head weights are {weights.dtype}, not float32"
        if isinstance(keys, QuantizedPool) and (keys.plain_dim or keys.group_size < keys.rounded_dim):
            return "a key must have one scale"
        return _refusal(query, weights) or _pool_refusal(keys)

    def index_select(query: Tensor, weights: Tensor, keys: Pool, layout: KeyLayout, topk: int) -> Tensor:
        ops.check_pool(keys)
        selection = torch.full((query.shape[0], min(topk, layout.max_context)), -1, dtype=torch.int32)
        for b, context in enumerate(layout.context_lengths):
            start, stop = layout.sequence_starts[b], layout.sequence_starts[b + 1]
            pages = no_pages if layout.page_table is None else layout.page_table[b].contiguous()
            found_nan = operators.index_select(
                query[start:stop],
                weights[start:stop],
                _bytes(keys),
                pages,
                layout.page_size,
                start,
                context,
                selection[start:stop],
            )
            if found_nan:
                raise KernelError(ops.NAN_SCORES)
        return selection

    return registry.Twin(name=name, devices=("cpu",), function=index_select, supports=supports, note=FLOATS)


def _mla_sparse_twin(name: str, operators: Any) -> registry.Twin:
    def supports(query: Tensor, latents: Pool, selection: Tensor, scale: float, latent_dim: int) -> str | None:
        if query.shape[-1] % 2 or latent_dim % LANES:
            return f"widths of {query.shape[-1]} and {latent_dim} are no multiples of 2 and of {LANES}"
        if isinstance(latents, QuantizedPool) and latents.rounded_dim != latent_dim:
            return f"{latents.rounded_dim} numbers of a row are rounded, not {latent_dim}"
        if not selection.is_contiguous():
            return "the selection is not contiguous"
        return _refusal(query) or _pool_refusal(latents)

    def mla_sparse(query: Tensor, latents: Pool, selection: Tensor, scale: float, latent_dim: int) -> Tensor:
        attended = query.new_empty(*query.shape[:2], latent_dim)
        group = latents.group_size if isinstance(latents, QuantizedPool) else 0
        operators.mla_sparse(query, _bytes(latents), group, selection, scale, attended)
        return attended

    return registry.Twin(name=name, devices=("cpu",), function=mla_sparse, supports=supports, note=FLOATS)


def _linear_twin(name: str, operators: Any) -> registry.Twin:
    def supports(x: Tensor, weight: ops.Weight) -> str | None:
        if not isinstance(weight, PackedWeight):
            return "the weight is not packed"
        return _refusal(x.contiguous()) if x.shape[-1] == weight.shape[-1] else "the widths of x and weight differ"

    def linear(x: Tensor, weight: PackedWeight) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        output = x.new_empty(len(rows), weight.shape[0])
        operators.linear(rows, weight.descriptor, output)
        return output.view(*x.shape[:-1], -1)

    return registry.Twin(name=name, devices=("cpu",), function=linear, supports=supports, note=PACKED)


def _moe_experts_twin(name: str, operators: Any) -> registry.Twin:
    def supports(hidden: Tensor, experts: Tensor, gates: Tensor, gate_up: ops.Weight, down: ops.Weight) -> str | None:
        if not (isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)):
            return "the weights are not packed"
        if 2 * gate_up.matrix.num_outputs != gate_up.shape[1]:
            return "gate and up were packed as one piece"
        if gates.dtype != torch.float32 or experts.dtype != torch.int64 or not experts.is_contiguous():
            return "gates must be float32, experts int64 and contiguous"
        return _refusal(hidden, gates)

    def moe_experts(
        hidden: Tensor, experts: Tensor, gates: Tensor, gate_up: PackedWeight, down: PackedWeight
    ) -> Tensor:
        output = torch.empty_like(hidden)
        operators.moe_experts(hidden, experts, gates, gate_up.descriptor, down.descriptor, gate_up.shape[0], output)
        return output

    return registry.Twin(name=name, devices=("cpu",), function=moe_experts, supports=supports, note=PACKED)


def _rms_norm_twin(name: str, operators: Any) -> registry.Twin:
    def supports(x: Tensor, weight: Tensor, eps: float) -> str | None:
        return _refusal(x, weight) if x.shape[-1:] == weight.shape else "the widths of x and weight differ"

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        output = torch.empty_like(x)
        operators.rms_norm(x, weight, eps, output)
        return output

    return registry.Twin(name=name, devices=("cpu",), function=rms_norm, supports=supports, note=FLOATS)


def _rope_table_twin(name: str, operators: Any) -> registry.Twin:
    def supports(positions: Tensor, rope_dim: int, theta: float, dtype: torch.dtype = torch.float32) -> str | None:
        if positions.device.type != "cpu" or dtype != torch.float32 or not positions.is_contiguous():
            return f"positions on {positions.device}, a table of {dtype}"
        return None

    def rope_table(
        positions: Tensor, rope_dim: int, theta: float, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        table = torch.empty(2, len(positions), rope_dim // 2)
        operators.rope_table(positions, theta, table[0], table[1])
        return table[0], table[1]

    return registry.Twin(name=name, devices=("cpu",), function=rope_table, supports=supports)


TWINS = {
    "index_select": _index_select_twin,
    "linear": _linear_twin,
    "mla_sparse": _mla_sparse_twin,
    "moe_experts": _moe_experts_twin,
    "rms_norm": _rms_norm_twin,
    "rope_table": _rope_table_twin,
}
