"""One process for each engine and format, so that its peak memory is its own, driven over JSON lines.

Only the one that works runs: the others are stopped by signal, because threads that wait for work (OpenMP's, a thread
pool's) may poll and take the processor from the one that is measured. Linux only.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import quiet
from numpy.typing import NDArray

PR_SET_PDEATHSIG = 1
CHUNK_SIZE = 512
PROBE_TOKENS = 16
Progress = Callable[[int, int], None]


class WorkerError(RuntimeError):
    """An engine could not do what it was asked to."""


class Engine(Protocol):
    """A model with one sequence. Constructed with the arguments that `Worker` was started with."""

    vocab_size: int

    def set_depth(self, num_tokens: int, progress: Progress) -> None:
        """Have `num_tokens` tokens in the cache, at least as many as before."""

    def read(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens, in chunks of CHUNK_SIZE; the logits [vocab] after the last one."""

    def forget(self) -> None:
        """Back to the depth that was set."""

    def versions(self) -> dict[str, str]:
        """What the figures depend on."""


def token_ids(vocab_size: int, start: int, stop: int) -> list[int]:
    """Tokens start .. stop-1 of one long random text, the same for every engine."""
    generator = np.random.Generator(np.random.PCG64(1))
    return generator.integers(0, vocab_size, size=stop)[start:].tolist()


def serve(make_engine: Callable[..., Engine]) -> None:
    """The worker's side: answer one request after the other until standard input ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped worker would not see its input end
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log
    engine: Engine | None = None

    def progress(done: int, total: int) -> None:
        print(json.dumps({"progress": [done, total]}), file=answers)

    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("action")
        try:
            if action == "load":
                engine = make_engine(**request)
                answer: dict[str, Any] = {"versions": engine.versions()}
            else:
                assert engine is not None, "load comes first"
                answer = _answer(engine, action, request, progress)
        except Exception as error:  # noqa: BLE001 - it is handled: the parent reports it beside the other engines
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def _answer(engine: Engine, action: str, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    match action:
        case "depth":
            begun = time.perf_counter()
            engine.set_depth(request["num_tokens"], progress)
            seconds = time.perf_counter() - begun
            probe_seconds = _read_and_forget(engine, PROBE_TOKENS)  # also what the first use of a depth allocates
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here
            return {"seconds": seconds, "probe_seconds": probe_seconds}
        case "prefill":
            engine.read(token_ids(engine.vocab_size, 0, 1))  # wakes threads and caches
            engine.forget()
            return {"seconds": _read_and_forget(engine, request["num_tokens"])}
        case "decode":
            tokens = token_ids(engine.vocab_size, 0, request["num_tokens"] + 1)
            engine.read(tokens[:1])
            num_tokens, seconds, begun = 0, 0.0, time.perf_counter()
            while num_tokens < request["num_tokens"] and seconds < request["most_seconds"]:
                num_tokens += 1
                engine.read([tokens[num_tokens]])
                seconds = time.perf_counter() - begun
            engine.forget()
            return {"num_tokens": num_tokens, "seconds": seconds}
        case "peak":
            lines = Path("/proc/self/status").read_text().splitlines()
            return {"bytes": next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))}
        case "logits":
            num_tokens, num_rows = request["num_tokens"], request["num_rows"]
            tokens = token_ids(engine.vocab_size, 0, num_tokens)
            engine.set_depth(0, progress)
            rows = [engine.read(tokens[: num_tokens - num_rows + 1])]
            rows += [engine.read([token]) for token in tokens[num_tokens - num_rows + 1 :]]
            engine.forget()
            np.save(request["path"], np.stack(rows), allow_pickle=False)
            return {}
        case _:
            raise AssertionError(action)


def _read_and_forget(engine: Engine, num_tokens: int) -> float:
    tokens = token_ids(engine.vocab_size, 0, num_tokens)
    begun = time.perf_counter()
    engine.read(tokens)
    seconds = time.perf_counter() - begun
    engine.forget()
    return seconds


class Worker:
    """The parent's side: an engine in a process of its own, which runs only while it answers."""

    def __init__(self, name: str, script: Path, arguments: dict[str, Any], log: Path) -> None:
        """Start and load. Raises WorkerError with the engine's own words."""
        self.name = name
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # an interrupt from the keyboard reaches only the parent, which then ends them
            )
        self._log = log
        try:
            self.versions: dict[str, str] = self.call("load", **arguments)["versions"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, action: str, *, progress: Progress | None = None, **arguments: Any) -> dict[str, Any]:
        """Let it do one thing. "others" in the answer is the share of the processors that others had meanwhile.

        Raises WorkerError.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        begun, others = time.perf_counter(), quiet.busy_seconds() - quiet.process_seconds(process.pid)
        try:
            process.send_signal(signal.SIGCONT)
            process.stdin.write(json.dumps({"action": action} | arguments) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if "progress" not in answer:
                    break
                if progress is not None:
                    progress(*answer["progress"])
            else:
                raise BrokenPipeError
        except BrokenPipeError:
            raise WorkerError(f"ended with {process.wait()}; see {self._log}") from None
        process.send_signal(signal.SIGSTOP)
        os.waitid(
            os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT
        )  # it stands still before another one runs
        if "error" in answer:
            raise WorkerError(answer["error"])
        others = quiet.busy_seconds() - quiet.process_seconds(process.pid) - others
        elapsed = time.perf_counter() - begun
        return answer | {"others": round(max(0.0, others - quiet.CLOCK_SECONDS) / (quiet.NUM_PROCESSORS * elapsed), 3)}

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
