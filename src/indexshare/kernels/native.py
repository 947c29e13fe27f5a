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

from indexshare import runtime
from indexshare.errors import ConfigError, KernelError
from indexshare.kernels import registry
from indexshare.kernels.twins import TWINS

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
