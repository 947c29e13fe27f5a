"""Progress on stderr for work whose pace changes: reading gets slower with every token that is there already."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Report = Callable[[int, int], None]
"""report(done, total)"""
SECONDS_TO_FIRST_LINE, SECONDS_BETWEEN_LINES = 10.0, 60.0


@dataclass(slots=True)
class Pace:
    """Seconds at which each amount was done; predicts the rest as a*n + b*n^2 with a, b >= 0."""

    begun: float = field(default_factory=lambda: time.perf_counter())
    done: list[int] = field(default_factory=lambda: [0])
    seconds: list[float] = field(default_factory=lambda: [0.0])

    def note(self, done: int) -> None:
        self.done.append(done)
        self.seconds.append(time.perf_counter() - self.begun)

    def remaining(self, total: int) -> float:
        """Seconds until `total` is done, from the time of the first and of the second half."""
        middle = len(self.done) // 2
        half, half_seconds = self.done[middle], self.seconds[middle]
        whole, whole_seconds = self.done[-1], self.seconds[-1]
        if not 0 < half < whole:
            return whole_seconds * (total / whole - 1) if whole else 0.0
        growth = (whole_seconds / whole - half_seconds / half) / (whole - half)
        quadratic = min(max(growth, 0.0), whole_seconds / whole**2)
        linear = whole_seconds / whole - quadratic * whole
        return linear * (total - whole) + quadratic * (total**2 - whole**2)


def clock(seconds: float) -> str:
    """ "1:05" or "2:00:07"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def bar(what: str, unit: str) -> Generator[Report]:
    """A bar with the time left. It is gone when all is done, and begins anew with a smaller amount.

    Nothing else may be written to the terminal while it is there. Without a terminal: a line after ten seconds, which
    says how long it will take, and then each minute.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[left]}"),
    )
    progress = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = progress.add_task(what, total=None, left="")
    pace = Pace()
    next_line = time.monotonic() + SECONDS_TO_FIRST_LINE

    def report(done: int, total: int) -> None:
        nonlocal pace, next_line
        if done < pace.done[-1]:
            pace = Pace()
        pace.note(done)
        left = f"{clock(pace.remaining(total))} left"
        progress.start()
        progress.update(task, completed=done, total=total, left=left)
        if progress.disable and 0 < done < total and time.monotonic() >= next_line:
            next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            sys.stderr.write(f"{what} {done:,}/{total:,} {unit}  {left}\n")
        if done >= total:
            progress.stop()

    try:
        yield report
    finally:
        progress.stop()
