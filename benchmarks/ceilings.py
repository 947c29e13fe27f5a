"""What this machine can do at best, measured: bytes from memory and products of matrices in each type of number.

Each pass measures everything once, a few hundredths of a second; the best of all passes is the ceiling. Nothing is
taken from a data sheet: virtual machines, memory and the frequency under load decide.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

MIB = 2**20
LARGEST = 2048 * MIB
SIZES = (1024, 2048)  # of square matrices; which is faster depends on caches and threads
MEMORY = "memory"
PRODUCTS = ("bfloat16", "float32", "int8")


def cache_bytes() -> int:
    """The last cache of the first processor; 32 MiB where the system does not say."""
    levels = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [level.read_text(encoding="ascii").strip() for level in levels]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 * MIB)


def far_bytes() -> int:
    """So much has to pass through the caches before data must come from memory again."""
    return min(LARGEST, max(128 * MIB, 4 * cache_bytes()))


class CeilingMeter:
    """best: the highest rates so far, of "memory" in bytes and of each type of number in operations per second."""

    def __init__(self) -> None:
        numbers = torch.ones(far_bytes() // 4)
        self._passes: list[tuple[str, float, Callable[[], Tensor]]] = []
        for num_streams in (1, torch.get_num_threads(), 8 * torch.get_num_threads()):
            rows = numbers[: len(numbers) // num_streams * num_streams].view(num_streams, -1)
            self._passes.append((MEMORY, rows.nbytes, lambda rows=rows: rows.sum(1)))
        for size in SIZES:
            wide = torch.randn(size, size)
            narrow, whole = wide.bfloat16(), torch.randint(-127, 128, (size, size), dtype=torch.int8)
            work = 2.0 * size**3
            self._passes += [
                ("float32", work, lambda x=wide: F.linear(x, x)),
                ("bfloat16", work, lambda x=narrow: F.linear(x, x)),
                ("int8", work, lambda x=whole: torch._int_mm(x, x)),
            ]
        self.best = dict.fromkeys((MEMORY, *PRODUCTS), 0.0)
        for _, _, run in self._passes:
            run()

    def measure(self) -> None:
        """One pass; `best` can only rise."""
        for name, work, run in self._passes:
            begun = time.perf_counter()
            run()
            self.best[name] = max(self.best[name], work / (time.perf_counter() - begun))
        # Where the processor multiplies a narrow type more slowly, widening the numbers first is the better way.
        self.best["bfloat16"] = max(self.best["bfloat16"], self.best["float32"])
        self.best["int8"] = max(self.best["int8"], self.best["bfloat16"])
