"""The C++ kernels one by one: how fast, and what share of this machine's own ceilings that is.

    python benchmarks/kernels.py                        all operations, two to four minutes
    python benchmarks/kernels.py --operations linear    one of them
    python benchmarks/kernels.py --json kernels.json    with every repeat

First each kernel's results are compared with its specification; one wrong result, and no speed is printed. Then the
figures are taken in turn, again and again, and between them the ceilings: bytes from memory and products of matrices
(`ceilings.py`). A share is the time at the ceiling - of memory or of products, whichever takes longer - over the time
that the kernel took. The median counts; spread is the middle half of the repeats.

"top-k" is 1 - (time with a top-k of one) / time: the same scores with next to nothing kept. It is an estimate, because
with k = 1 fewer scores pass the threshold as well.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch
from ceilings import CeilingMeter
from kernel_cases import OPERATIONS, Case, Run, all_cases
from quiet import QUIET_SHARE, Patience, busy_seconds, process_seconds
from rich.console import Console
from rich.table import Table

from indexshare import runtime
from indexshare.kernels import native, registry

REPEATS, QUICK_REPEATS = 9, 7
SECONDS, QUICK_SECONDS = 0.04, 0.02  # of one repeat: as many calls as it takes, at least one
SHOWN = ("processor", "threads", "instruction set", "compiler")
PATIENCE = 60  # seconds, in all, that a run waits for other programs to end
HAS_PROC = Path("/proc/stat").exists()


@dataclass(slots=True, kw_only=True)
class Figure:
    """What was measured of one case. seconds: of one call, for every repeat; one_kept: the same with a top-k of one.

    ceilings: of memory in bytes and of products in operations per second, measured between the repeats. others: the
    share of the processors that other programs had meanwhile.
    """

    name: str
    num_bytes: float
    num_operations: float
    bound: str = ""
    seconds: list[float] = field(default_factory=list)
    one_kept: list[float] = field(default_factory=list)
    seconds_at_ceiling: float = 0.0
    others: float = 0.0

    @property
    def share(self) -> float:
        """Of the ceiling, by the median."""
        return self.seconds_at_ceiling / median(self.seconds)

    @property
    def best_share(self) -> float:
        """Of the ceiling, by the fastest repeat: what other programs disturb least."""
        return self.seconds_at_ceiling / min(self.seconds)

    @property
    def spread(self) -> float:
        """The middle half of the repeats over the median."""
        if len(self.seconds) < 2:
            return 0.0
        lower, _, upper = quantiles(self.seconds, n=4)
        return (upper - lower) / median(self.seconds)

    @property
    def topk_share(self) -> float | None:
        """The part of the time that goes into the top-k; None for other operations."""
        return 1 - median(self.one_kept) / median(self.seconds) if self.one_kept else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 when a result is wrong."""
    options = _parse(arguments)
    progress = Console(stderr=True)
    reason = start(options.threads)
    if reason is not None:
        progress.print(f"there is nothing to measure: {reason}")
        return 1
    cases = all_cases(options.operations, options.quick)
    if wrong := check(cases, progress):
        for name, what in wrong.items():
            progress.print(f"[bold red]wrong[/]: {name}: {what}")
        progress.print("no speeds are measured")
        return 1
    begun = time.perf_counter()
    figures, ceilings = measure(cases, options.quick, progress, Patience(options.patience))
    machine = describe_machine()
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(render(figures, ceilings, machine))
    warn_of_others(figures, progress)
    progress.print(f"measured in {time.perf_counter() - begun:.0f} s")
    if options.json:
        write_json(options.json, figures, ceilings, machine)
    return 0


def start(threads: int | None) -> str | None:
    """Sets the threads and loads the kernels. Returns why there are none, or None."""
    torch.manual_seed(0)
    runtime.set_threads(threads)
    return native.enable()


@torch.no_grad()
def check(cases: Sequence[Case], progress: Console) -> dict[str, str]:
    """Name of case -> what is wrong with its results; only the C++ kernels may take the calls."""
    wrong = {}
    with progress.status("comparing the kernels with their specifications") as status:
        for case in cases:
            status.update(f"comparing with the specification: {case.name}")
            with registry.use(case.operation, native.NAME):
                found = case.check()
            if found is not None:
                wrong[case.name] = found
    if not wrong:
        progress.print(f"results of {len(cases)} cases are those of the specification")
    return wrong


@torch.no_grad()
def measure(
    cases: Sequence[Case], quick: bool, progress: Console, patience: Patience
) -> tuple[list[Figure], dict[str, float]]:
    """Figures of the cases, and the ceilings: one operation after the other, the cases of each in turn."""
    meter, figures = CeilingMeter(), []
    with progress.status("measuring") as status:
        for operation in dict.fromkeys(case.operation for case in cases):
            group = [case for case in cases if case.operation == operation]
            status.update(f"measuring {operation}: {len(group)} figures")
            with registry.use(operation, native.NAME):
                figures += _measure_group(group, meter, quick, patience)
    for case, figure in zip(cases, figures, strict=True):
        figure.seconds_at_ceiling = case.seconds_at(meter.best)
        figure.bound = case.bound(meter.best)
    return figures, meter.best


def _measure_group(cases: Sequence[Case], meter: CeilingMeter, quick: bool, patience: Patience) -> list[Figure]:
    figures = [Figure(name=one.name, num_bytes=one.num_bytes, num_operations=one.num_operations) for one in cases]
    runs = [case.prepare() for case in cases]
    least = QUICK_SECONDS if quick else SECONDS
    calls = [[max(1, math.ceil(least / _seconds(run, 2))) for run in of_case] for of_case in runs]
    clock = OthersClock()
    for _ in range(QUICK_REPEATS if quick else REPEATS):
        if HAS_PROC:
            patience.wait()
        clock.start()
        meter.measure()
        for figure, of_case, num_calls in zip(figures, runs, calls, strict=True):
            for repeats, run, count in zip((figure.seconds, figure.one_kept), of_case, num_calls, strict=False):
                repeats.append(_seconds(run, count))
        clock.stop()
    for figure in figures:
        figure.others = clock.share
    return figures


def _seconds(run: Run, count: int) -> float:
    """Of one call, the mean of `count` in a row."""
    begun = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begun) / count


class OthersClock:
    """share: of the processors, what other programs had between `start` and `stop`; 0 where there is no /proc."""

    def __init__(self) -> None:
        self._elapsed = self._used = 0.0

    def start(self) -> None:
        self._add(-1)

    def stop(self) -> None:
        self._add(1)

    def _add(self, sign: int) -> None:
        self._elapsed += sign * time.perf_counter()
        if HAS_PROC:
            self._used += sign * (busy_seconds() - process_seconds(os.getpid()))

    @property
    def share(self) -> float:
        return max(0.0, self._used / (self._elapsed * (os.cpu_count() or 1)))


def warn_of_others(figures: Sequence[Figure], progress: Console) -> None:
    """Says which figures come from a machine that was not quiet."""
    noisy = {figure.name.split()[0]: figure.others for figure in figures if figure.others > QUIET_SHARE}
    for operation, share in noisy.items():
        progress.print(f"[yellow]other programs had {share:.0%} of the processors while {operation} was measured[/]")


def describe_machine() -> dict[str, str]:
    """Processor, threads, instruction set, compiler, versions."""
    compiler = native._compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {
        "processor": processor("model name") or platform.machine(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "instruction set": native.instruction_set(),
        "compiler": version,
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor(field_name: str) -> str:
    """A field of the first processor in /proc/cpuinfo; "" where there is none."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.split("\t")[0] == field_name), "")


def render(figures: Sequence[Figure], ceilings: dict[str, float], machine: dict[str, str]) -> Table:
    """One line for each figure."""
    limits = f"memory {ceilings['memory'] / 1e9:.1f} GB/s, products " + ", ".join(
        f"{name} {ceilings[name] / 1e9:,.0f} G/s" for name in ("float32", "bfloat16", "int8")
    )
    where = ", ".join((*(machine[name] for name in SHOWN), f"torch {machine['torch']}"))
    table = Table(title=f"{where}\nceilings: {limits}", title_justify="left", title_style="")
    table.add_column("operation", no_wrap=True)
    for name in ("a call", "GB/s", "GFLOP/s", "bound by", "share", "spread", "top-k", "others"):
        table.add_column(name, justify="right", no_wrap=True)
    for previous, figure in zip([None, *figures], figures, strict=False):
        if previous is not None and previous.name.split()[0] != figure.name.split()[0]:
            table.add_section()
        seconds = median(figure.seconds)
        table.add_row(
            figure.name,
            f"{seconds * 1e3:.3f} ms" if seconds < 0.01 else f"{seconds * 1e3:.1f} ms",
            f"{figure.num_bytes / seconds / 1e9:.1f}",
            f"{figure.num_operations / seconds / 1e9:.0f}",
            figure.bound,
            f"{figure.share:.0%}",
            f"{figure.spread:.0%}",
            "" if figure.topk_share is None else f"{figure.topk_share:.0%}",
            f"{figure.others:.0%}",
        )
    return table


def write_json(path: Path, figures: Sequence[Figure], ceilings: dict[str, float], machine: dict[str, str]) -> None:
    """Everything, with every repeat."""
    rows = [
        asdict(figure) | {"share": figure.share, "spread": figure.spread, "topk_share": figure.topk_share}
        for figure in figures
    ]
    content = {"machine": machine, "ceilings": ceilings, "figures": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def operations(text: str) -> tuple[str, ...]:
        if unknown := sorted(set(text.split(",")) - set(OPERATIONS)):
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(OPERATIONS)}")
        return tuple(name for name in OPERATIONS if name in text.split(","))

    parser.add_argument("--operations", type=operations, default=OPERATIONS, help=f"default {','.join(OPERATIONS)}")
    parser.add_argument("--threads", type=int, help="default all processors")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats, one to two minutes")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds to wait, in all, for a quiet machine")
    parser.add_argument("--json", type=Path, help="write machine, ceilings and every repeat")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
