"""Is anybody else using the processors? Two threads that wait for each other get tenfold slower when a third runs."""

import os
import time
from pathlib import Path

QUIET_SHARE = 0.05  # of the processors; a figure with more than that in it is marked
NOISY_SHARE = 0.15  # a figure with more than that in it is measured again, while there is patience
SAMPLE_SECONDS = 0.3
CLOCK_SECONDS = 0.03  # of processor time, to which the system's figures are right
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
NUM_PROCESSORS = os.cpu_count() or 1


def busy_seconds(*, with_nice: bool = True) -> float:
    """Processor time that everything together has used so far; time that the host took away counts as used.

    with_nice=False leaves out programs of low priority, which yield to ours for the most part.
    """
    fields = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()[1:]
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, fields[:8])
    return (user + nice * with_nice + system + interrupts + soft_interrupts + stolen) / TICKS_PER_SECOND


def process_seconds(pid: int) -> float:
    """Processor time that one process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


class Patience:
    """Seconds that may be spent on waiting for a quiet machine, in all."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait(self) -> None:
        """Until others are quiet or of low priority, or the patience is spent. To be called while we do nothing."""
        while self.seconds > 0:
            begun, busy = time.perf_counter(), busy_seconds(with_nice=False)
            time.sleep(SAMPLE_SECONDS)
            elapsed = time.perf_counter() - begun
            if busy_seconds(with_nice=False) - busy <= NOISY_SHARE * NUM_PROCESSORS * elapsed:
                return
            self.seconds -= elapsed
