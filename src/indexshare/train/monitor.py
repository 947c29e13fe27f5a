"""What a person sees of a run: the JSON-lines log, the progress bar, and Ctrl-C that ends it well."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 60.0


class StopSignals:
    """Context manager: the first SIGINT or SIGTERM sets `received`, a second one acts as usual.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()
        sys.stderr.write("stopping after this step, with a checkpoint (once more to stop at once)\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


class Monitor:
    """Context manager that writes log lines and shows progress on stderr: a bar on a terminal, else a line a minute."""

    def __init__(self, log_path: Path, num_steps: int, first_step: int, progress: bool) -> None:
        self._log = log_path.open("a", encoding="utf-8")
        self._num_steps = num_steps
        self._first_step = first_step
        self._progress = progress
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            speed_estimate_period=300,
            disable=not (progress and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("train", total=num_steps, completed=first_step, status="")

    def __enter__(self) -> Monitor:
        if self._progress and self._first_step >= self._num_steps:
            sys.stderr.write(
                f"this run finished at step {self._first_step:,}; name another output directory to train again\n"
            )
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        self._log.close()

    def report(self, record: dict[str, Any], *, log: bool) -> None:
        """Show one step's record; write it to the log when `log`."""
        if log:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
        step = record["step"]
        status = f"loss {record['lm']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, description=record["phase"], completed=step, status=status)
        now = time.monotonic()
        if self._progress and self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            remaining = (now - self._started) / (step - self._first_step) * (self._num_steps - step)
            place = f"{record['phase']} step {step}/{self._num_steps}"
            sys.stderr.write(f"{place}  {status}  {remaining / 60:.0f} min left\n")


def last_logged_loss(path: Path) -> float:
    """The language-model loss in the last line of a log; NaN when there is no line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1])["lm"] if lines else math.nan


def keep_log_until(path: Path, step: int) -> None:
    """Drop log lines of steps after `step`, which a killed run wrote and the resumed one writes again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            is_kept = json.loads(line)["step"] <= step
        except ValueError:  # a line that a crash cut off
            is_kept = False
        if is_kept:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
