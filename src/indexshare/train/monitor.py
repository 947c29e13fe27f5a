"""What a person sees of a run: the JSON-lines log, the progress bar, and Ctrl-C that ends it well."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from indexshare.data.shards import write_file
from indexshare.errors import TrainingError
from indexshare.train.phases import Phase

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

    The first line comes early, so that one sees at once how long it will take; then there is one each minute. The time
    left is that of all tokens which are left, at the pace of the running phase.
    """

    def __init__(self, log_path: Path, phases: Sequence[Phase], first_step: int, progress: bool) -> None:
        self._path = log_path
        self._log = log_path.open("ab", buffering=0)  # what a full disk refused is not tried again
        tokens = [phase.batch_size * phase.sequence_length for phase in phases]  # of a step
        steps = [phase.num_steps for phase in phases]
        self._work = np.concatenate([[0], np.repeat(tokens, steps).cumsum()])  # tokens before each step
        self._phases = np.repeat(np.arange(len(steps)), steps)  # of each step
        self._num_steps = sum(steps)
        self._first_step = first_step
        self._progress = progress
        now = time.monotonic()
        self._pace_from = self._last = (first_step, now)  # since when the phase runs; the newest step
        self._next_line = now + SECONDS_TO_FIRST_LINE
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not (progress and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("train", total=self._num_steps, completed=first_step, status="")

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
        shown = shown_loss(record)
        now = time.monotonic()
        left = timedelta(seconds=round(self._seconds_left(step, now)))
        status = f"loss {shown:.3f}  {record['tokens_per_second']:,.0f} tokens/s  {left} left"
        self._bar.update(self._task, description=record["phase"], completed=step, status=status)
        if self._progress and self._bar.disable and now >= self._next_line and step < self._num_steps:
            self._next_line = now + SECONDS_BETWEEN_LINES
            sys.stderr.write(f"{record['phase']} step {step}/{self._num_steps}  {status}\n")

    def _seconds_left(self, step: int, now: float) -> float:
        """What the steps after `step` will take, which was completed at `now`."""
        if self._phases[step - 1] != self._phases[self._pace_from[0]]:
            self._pace_from = self._last
        self._last = (step, now)
        first, since = self._pace_from
        return (now - since) / (self._work[step] - self._work[first]) * (self._work[-1] - self._work[step])

    def rewind(self, step: int) -> None:
        """Go on from an earlier step; `keep_log_until` has replaced the log."""
        self._log.close()
        self._log = self._path.open("ab", buffering=0)
        self._pace_from = self._last = (step, time.monotonic())
        self._bar.update(self._task, completed=step)


def shown_loss(record: Mapping[str, Any]) -> float:
    """The language-model loss of a step's record; where the model is frozen there is none, and it is the total."""
    return record["lm"] or record["loss"]


def last_logged_loss(path: Path) -> float:
    """The newest `shown_loss` in a log; NaN when there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = map(json.loads, reversed(lines))
    return next((shown_loss(record) for record in records if "lm" in record), math.nan)


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
