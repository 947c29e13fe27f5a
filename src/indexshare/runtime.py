"""The machine: settings from the environment, device, dtype, threads, seeds, memory. The only reader of `INDEXSHARE_*`.

| variable | meaning | default |
|---|---|---|
| `INDEXSHARE_THREADS` | CPU threads for tensor work | the CPUs this process may use; under torchrun an equal share |
| `INDEXSHARE_WORKSPACE_MIB` | budget for temporary buffers of one operation, in MiB | 256 |
| `INDEXSHARE_DEVICE` | what `device="auto"` means | cuda when there is one, else cpu |
| `INDEXSHARE_ISA` | instruction set of the C++ kernels: avx512, avx2, scalar | the best of this processor |
| `INDEXSHARE_CACHE` | directory for compiled kernels | indexshare in `XDG_CACHE_HOME` or ~/.cache |
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from indexshare.errors import ConfigError

if TYPE_CHECKING:
    import torch

PREFIX = "INDEXSHARE_"
DTYPES = ("bfloat16", "float16", "float32", "float64")
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}
MIB = 1024 * 1024
CACHE_LINE = 64
HUGE_PAGE, ADVISE_HUGE_PAGES = 2 * MIB, 14  # madvise; a kernel that knows no such pages refuses, which is fine


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment asks for. `threads` None means: as `set_threads` says."""

    threads: int | None = None
    workspace_mib: int = 256
    device: str = "auto"
    isa: str | None = None
    cache: Path | None = None

    @property
    def workspace_bytes(self) -> int:
        """Budget for the temporary buffers of one operation."""
        return self.workspace_mib * MIB


@cache  # every operation asks; `settings.cache_clear()` makes the next call read the environment again
def settings() -> Settings:
    """What `INDEXSHARE_*` said at the first call. Raises ConfigError for an unknown variable or an unusable value."""
    given = {name.removeprefix(PREFIX).lower(): text for name, text in os.environ.items() if name.startswith(PREFIX)}
    known = set(Settings.__dataclass_fields__)
    if unknown := sorted(set(given) - known):
        names, right = (", ".join(PREFIX + name.upper() for name in group) for group in (unknown, sorted(known)))
        raise ConfigError(f"unknown environment variable {names}; known: {right}")
    return Settings(
        threads=_positive_integer(given, "threads", None),
        workspace_mib=_positive_integer(given, "workspace_mib", None) or Settings().workspace_mib,
        device=given.get("device", "auto"),
        isa=given.get("isa"),
        cache=Path(given["cache"]) if "cache" in given else None,
    )


def _positive_integer(given: dict[str, str], name: str, default: int | None) -> int | None:
    text = given.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ConfigError(f"{PREFIX}{name.upper()} must be a positive whole number, not {text!r}")
    return int(text)


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device for a name such as "auto", "cpu", "cuda", "cuda:1"; checked to exist. Raises ConfigError."""
    import torch

    if name == "auto":
        name = settings().device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        # torch asserts for "cuda" in a CPU build and raises the others for absent or mistyped devices
        reason = str(error).strip().split("\n", 1)[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype for "bfloat16", "float16", "float32", "float64" (short: bf16, fp16, fp32). Raises ConfigError."""
    import torch

    full_name = DTYPE_ALIASES.get(name, name)
    if full_name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; use one of {', '.join(DTYPES)}")
    return getattr(torch, full_name)


def num_usable_cpus() -> int:
    """CPUs this process may run on; smaller than the machine's number inside a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(num_threads: int | None = None) -> int:
    """Set torch's CPU threads: the argument, else `INDEXSHARE_THREADS`, else the usable CPUs. Returns the number.

    Processes that torchrun started on one machine share its CPUs evenly. Raises ConfigError for a number below 1.
    """
    import torch

    if num_threads is not None and num_threads < 1:
        raise ConfigError(
            f"threads must be at least 1, not {num_threads}; leave it out to use all CPUs of this process"
        )
    share = max(num_usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    chosen = num_threads or settings().threads or share
    torch.set_num_threads(chosen)
    return chosen


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (all devices)."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def empty_bytes(count: int) -> torch.Tensor:
    """Uninitialised memory on the CPU, uint8 [count], in pages of 2 MiB where Linux gives them when asked.

    Large tables that are read in no order, or at full speed, are read faster so (docs/experiments.md).
    """
    import torch

    if count < HUGE_PAGE or sys.platform != "linux":
        return torch.empty(count, dtype=torch.uint8)
    whole = torch.empty(count + HUGE_PAGE, dtype=torch.uint8)
    aligned = whole[-whole.data_ptr() % HUGE_PAGE :][:count]
    ctypes.CDLL(None).madvise(ctypes.c_void_p(aligned.data_ptr()), ctypes.c_size_t(count), ADVISE_HUGE_PAGES)
    return aligned


def interrupt(number: int, frame: object) -> None:
    """A handler of SIGINT: as Python's own, but while torch is imported the process ends.

    torch would catch what is raised then and go on with half of numpy.
    """
    torch_module = sys.modules.get("torch")
    if torch_module is not None and getattr(torch_module.__spec__, "_initializing", False):
        sys.stderr.write("interrupted\n")
        os._exit(130)
    raise KeyboardInterrupt


def return_freed_memory() -> None:
    """Give the system back what the allocator keeps after a model was loaded and packed; Linux with glibc."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


class Slab:
    """Uninitialised memory for many small tables, side by side in pages of 2 MiB; freed when the last one is gone."""

    def __init__(self, num_bytes: int = 16 * HUGE_PAGE) -> None:
        self._num_bytes = num_bytes
        self._rest: torch.Tensor | None = None

    def empty(self, count: int) -> torch.Tensor:
        """uint8 [count], as from `empty_bytes`."""
        if count >= HUGE_PAGE:
            return empty_bytes(count)
        size = -(-count // CACHE_LINE) * CACHE_LINE
        if self._rest is None or len(self._rest) < size:
            self._rest = empty_bytes(self._num_bytes)
        table, self._rest = self._rest[:count], self._rest[size:]
        return table


def available_memory_bytes(device: str = "cpu") -> int:
    """Bytes that can still be allocated: on the CPU the smaller of the machine's and the control group's remainder."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(torch.device(device))[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS: no figure for what is free, so report what is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([_kibibyte_field(meminfo, "MemAvailable:"), *_control_group_remainders()])


def peak_memory_bytes(device: str = "cpu") -> int:
    """Highest resident memory of this process so far (CPU), or highest allocation by torch on the given CUDA device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(torch.device(device))
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: its figure starts at the parent's, VmHWM at this program's
        return _kibibyte_field(status, "VmHWM:")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: str = "cpu") -> bool:
    """Start `peak_memory_bytes` anew from the present use. False where the system does not allow it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(torch.device(device))
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _kibibyte_field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"{path} has no {name} line")


def _control_group_remainders() -> list[int]:
    """Limit minus use for every control group (version 1 or 2) above this process that has a limit."""
    membership = Path("/proc/self/cgroup")
    if not membership.exists():
        return []
    remainders = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_name, usage_name = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_name, usage_name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(root, path.lstrip("/"))
        for directory in (group, *group.parents):
            if not directory.is_relative_to(root):
                break
            limit_file = directory / limit_name
            if limit_file.exists() and (limit := limit_file.read_text().strip()) != "max":
                usage = int((directory / usage_name).read_text()) - _reclaimable_bytes(directory / "memory.stat")
                remainders.append(max(int(limit) - usage, 0))
    return remainders


def _reclaimable_bytes(stat: Path) -> int:
    """File pages that the kernel gives back under pressure; counted as use by the control group."""
    if not stat.exists():
        return 0
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))
