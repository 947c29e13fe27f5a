"""What a person sees of a run: the JSON-lines log, the progress bar, and Ctrl-C that ends it well."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from indexshare.data.shards import write_file
from indexshare.errors import TrainingError

SECONDS_TO_FIRST_LINE, SECONDS_BETWEEN_LINES = 10.0, 60.0


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
    """Context manager that writes log lines and shows progress on stderr: a bar on a terminal, else lines.

    The first line comes early, so that one sees at once how long it will take; then there is one each minute.
    """

    def __init__(self, log_path: Path, num_steps: int, first_step: int, progress: bool) -> None:
        self._path = log_path
        self._log = log_path.open("ab", buffering=0)  # what a full disk refused is not tried again
        self._num_steps = num_steps
        self._first_step = first_step
        self._progress = progress
        self._started = time.monotonic()
        self._next_line = self._started + SECONDS_TO_FIRST_LINE
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
        """Show one step's record; write it to the log when `log`. Raises TrainingError when that cannot be done."""
        if log:
            try:
                self._log.write(json.dumps(record).encode() + b"\n")
            except OSError as error:
                raise TrainingError(f"{self._path} could not be written ({error}). Make room and run again.") from error
        if "skipped" in record:
            return
        step = record["step"]
        shown = record["lm"] or record["loss"]  # where the model is frozen there is no language-model loss
        status = f"loss {shown:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, description=record["phase"], completed=step, status=status)
        now = time.monotonic()
        if self._progress and self._bar.disable and now >= self._next_line and step < self._num_steps:
            self._next_line = now + SECONDS_BETWEEN_LINES
            remaining = (now - self._started) / (step - self._first_step) * (self._num_steps - step)
            place = f"{record['phase']} step {step}/{self._num_steps}"
            sys.stderr.write(f"{place}  {status}  {timedelta(seconds=round(remaining))} left\n")

    def rewind(self, step: int) -> None:
        """Go on from an earlier step; `keep_log_until` has replaced the log."""
        self._log.close()
        self._log = self._path.open("ab", buffering=0)
        self._first_step = min(self._first_step, step)
        self._bar.update(self._task, completed=step)


def last_logged_loss(path: Path) -> float:
    """The newest language-model loss in a log; NaN when there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = map(json.loads, reversed(lines))
    return next((record["lm"] for record in records if "lm" in record), math.nan)


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
    write_file(path, "".join(kept).encode())
