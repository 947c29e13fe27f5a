"""Servers for the tests with real clients: `indexshare serve nano` as a process, and a scripted model in a thread."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from server.scripted import Script, ScriptedService

from indexshare.server.app import ServerSettings, create_app
from indexshare.server.serve import listen, make_server

READY_SECONDS = 120.0
INDEXSHARE = Path(sys.executable).with_name("indexshare")

Line = dict[str, Any]


class ServerProcess:
    """A running `indexshare serve`. log: its lines so far, each an object."""

    def __init__(self, *arguments: str) -> None:
        options = ("--port", "0", "--log-format", "json", "--threads", "2")
        self.log: list[Line] = []
        self._grown = threading.Condition()
        command = [str(INDEXSHARE), "serve", "nano", *options, *arguments]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            listening = self.wait_for(lambda line: line["message"].startswith("listening on"), READY_SECONDS)
            self.wait_for(lambda line: line["message"].startswith("ready"), READY_SECONDS)
        except BaseException:
            self._process.kill()
            self._end()
            raise
        self.url = listening["message"].removeprefix("listening on ")

    def _read(self) -> None:
        assert self._process.stderr is not None
        for text in self._process.stderr:
            with self._grown:
                self.log.append(json.loads(text) if text.startswith("{") else {"message": text})
                self._grown.notify_all()
        with self._grown:
            self.log.append({"message": "the process has ended"})
            self._grown.notify_all()

    def wait_for(self, wanted: Callable[[Line], bool], seconds: float = 30.0, *, start: int = 0) -> Line:
        """The first line from `start` on that is wanted. An AssertionError if none comes in time, or none can."""

        def found() -> Line | None:
            return next((line for line in self.log[start:] if wanted(line)), None)

        with self._grown:
            assert self._grown.wait_for(lambda: found() or self._process.poll() is not None, seconds), self.log[start:]
            line = found()
        assert line is not None, self.log[-5:]
        return line

    def requests(self, start: int = 0) -> list[Line]:
        """The log lines of requests to the API."""
        return [line for line in self.log[start:] if line.get("path", "").startswith("/v1/")]

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Until the engine runs nothing and nothing waits; an AssertionError if that takes longer."""
        end = time.monotonic() + seconds
        while any(self.metric(f"indexshare_engine_{name}") for name in ("running", "waiting", "live_pages")):
            assert time.monotonic() < end, "the engine still runs a request that nobody reads"
            time.sleep(0.05)  # the engine tells nobody when a step ends

    def metric(self, name: str) -> float:
        """A gauge without labels, from /metrics."""
        text = httpx2.get(f"{self.url}/metrics").text
        return float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0])

    def close(self) -> None:
        """End the process as an operator does; it must end in order."""
        self._process.terminate()
        assert self._end() == 0, self.log[-10:]
        assert not [line for line in self.log if line.get("level") == "error"]

    def _end(self) -> int:
        code = self._process.wait(30)
        self._reader.join(10)
        assert self._process.stderr is not None
        self._process.stderr.close()
        return code


@contextmanager
def nano_server(*arguments: str) -> Iterator[ServerProcess]:
    """A process that serves the shipped model; it must neither log an error nor fail to end."""
    server = ServerProcess(*arguments)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def scripted_server(script: Script, *, context_length: int = 200_000) -> Iterator[tuple[str, ScriptedService]]:
    """The whole HTTP server and its dialects over a scripted model, in a thread: its URL, and what it was asked."""
    service = ScriptedService(script, model_names=("nano",), context_length=context_length)
    settings = ServerSettings(port=0)
    listener = listen(settings)
    server = make_server(create_app(service, settings), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def refused(lines: Sequence[Line]) -> list[Line]:
    """Those requests that got an error."""
    return [line for line in lines if line["status"] >= 400]
