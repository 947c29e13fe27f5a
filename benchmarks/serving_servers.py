"""Servers as processes of their own on 127.0.0.1 that end with the benchmark, whatever ends it. Linux only."""

import ctypes
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import quiet
from workers import PR_SET_PDEATHSIG

READY_SECONDS = 300.0
END_SECONDS = 5.0
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
LIBC = ctypes.CDLL(None)


class ServerError(RuntimeError):
    """A server did not start, or ended."""


class Server:
    """A process that answers HTTP. Leaving the context ends it."""

    def __init__(
        self, name: str, command: Sequence[str], port: int, log: Path, *, ready_path: str, key: str | None = None
    ) -> None:
        """Start it; `wait` until it is ready before anything is asked."""
        self.name, self.port, self.log = name, port, log
        self._ready_path = ready_path
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        log.parent.mkdir(parents=True, exist_ok=True)
        # indexshare refuses variables that it does not know, and this one is the benchmark's.
        environment = {name: value for name, value in os.environ.items() if name != "INDEXSHARE_PEERS"}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # an interrupt from the keyboard reaches only the parent, which then ends it
                preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self) -> Self:
        """Until it can answer. Raises ServerError with the end of its log."""
        deadline = time.monotonic() + READY_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError, http.client.HTTPException):
                if self.get(self._ready_path)[0] == 200:
                    return self
            time.sleep(0.05)
        lines = self.log.read_text(errors="replace").splitlines()
        raise ServerError(f"{self.name} did not get ready: {' / '.join(lines[-3:])}; see {self.log}")

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """`/metrics`: "name" or "name{labels}" to value."""
        return parse_metrics(self.get("/metrics")[1])

    @property
    def cpu_seconds(self) -> float:
        return quiet.process_seconds(self._process.pid)

    @property
    def rss_bytes(self) -> int:
        """Resident memory now; 0 when it has ended."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def pause(self) -> None:
        """Stop it by signal: threads that wait for work may poll and take the processor from others."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def terminate(self, most_seconds: float) -> int | None:
        """Ask it to end, in order; its exit code, None when it is still there after `most_seconds`."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(most_seconds)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.send_signal(signal.SIGCONT)
        if self.is_running and self.terminate(END_SECONDS) is None:
            self._process.kill()
        self._process.wait()


def end_on_signal() -> None:
    """SIGTERM ends this program as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def our_server(
    model: str, log: Path, *, name: str, threads: int | None = None, key: str | None = None, **options: object
) -> Server:
    """`indexshare serve`; options are those of the command, `cache_tokens=8192` for --cache-tokens 8192."""
    port = free_port()
    command = [sys.executable, "-m", "indexshare.cli", "serve", model, "--port", str(port)]
    flags: Mapping[str, object] = options | ({} if threads is None else {"threads": threads})
    for flag, value in flags.items():
        command += [f"--{flag.replace('_', '-')}", str(value)]
    return Server(name, command, port, log, ready_path="/ready", key=key)


def llama_server(
    program: Path,
    gguf: Path,
    log: Path,
    *,
    name: str,
    threads: int,
    slots: int,
    slot_tokens: int,
    flash_attention: bool,
) -> Server:
    """llama.cpp's server with as many slots as there are clients, batches of our size, and nothing cached for later."""
    port = free_port()
    command = [
        *(str(program), "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--offline"),
        *("--threads", str(threads), "--threads-batch", str(threads), "--parallel", str(slots)),
        *("--ctx-size", str(slots * slot_tokens), "--batch-size", "2048", "--ubatch-size", "512", "--cont-batching"),
        *("--flash-attn", "on" if flash_attention else "off", "--no-cache-prompt", "--cache-ram", "0", "--no-webui"),
    ]
    return Server(name, command, port, log, ready_path="/health")


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus' text format: "name" or "name{labels}" to value."""
    return {name + (f"{{{labels}}}" if labels else ""): float(value) for name, labels, value in SAMPLE.findall(text)}
