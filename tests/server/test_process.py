"""`indexshare serve` as a process: start, readiness, signals, clients that leave, memory that comes back."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

KEY = "a-key-for-tests-only-0001"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A running server."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        program = "from indexshare.cli import main; main()"
        command = [sys.executable, "-c", program, "serve", "nano", "--port", str(self.port), *arguments]
        # not a pipe: one that nobody reads would stop the server
        descriptor, name = tempfile.mkstemp()
        self._log = Path(name)
        self.process = subprocess.Popen(command, stderr=descriptor)
        os.close(descriptor)

    def get(self, path: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={"x-api-key": KEY})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, path: str, body: object) -> tuple[int, str]:
        data = json.dumps(body).encode()
        headers = {"content-type": "application/json", "x-api-key": KEY}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(OSError):
                if self.get("/ready")[0] == 200:
                    return
            time.sleep(0.05)
        pytest.fail("it does not become ready")

    def figure(self, name: str) -> float:
        lines = self.get("/metrics")[1].splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"indexshare_engine_{name} "))

    def stream_and_leave(self, max_tokens: int = 3000) -> None:
        """Ask for a long reply, read its beginning, and go."""
        body = json.dumps({"prompt": "def main():", "max_tokens": max_tokens, "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"x-api-key: {KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(head.encode() + body)
            received = b""
            while received.count(b"data: ") < 3:
                received += connection.recv(4096) or pytest.fail(f"the stream ended: {received!r}")

    def end(self, how: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(how)
        return self.wait(), self.log()

    def wait(self) -> int:
        return self.process.wait(timeout=60)

    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    keys = tmp_path / "keys"
    keys.write_text(f"tester:{KEY}\n")
    keys.chmod(0o600)
    started = Process("--cache-tokens", "65536", "--drain-seconds", "3", "--api-key-file", str(keys))
    try:
        started.wait_until_ready()
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()


def test_from_start_to_end(server: Process) -> None:
    """Health before readiness, an answer, an empty engine, no key in the log, an orderly end."""
    assert server.get("/health")[0] == 200
    status, answer = server.post("/v1/completions", {"prompt": "import os\n", "max_tokens": 8})
    assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] > 0
    status, answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 10_000_000}]})
    assert status == 400 and "10000000 bytes of text without a line break" in answer
    assert server.get("/health")[0] == 200
    code, log = server.end()
    assert code == 0, log
    assert KEY not in log and "import os" not in log and "Traceback" not in log
    assert "path=/v1/completions status=200" in log


def leave_in_crowds(server: Process, count: int) -> None:
    crowd = [threading.Thread(target=server.stream_and_leave) for _ in range(count)]
    for client in crowd:
        client.start()
    for client in crowd:
        client.join()


def wait_until_idle(server: Process) -> None:
    deadline = time.monotonic() + 30
    while server.figure("running") + server.figure("waiting") > 0:
        assert time.monotonic() < deadline, "requests of clients that left still run"
        time.sleep(0.05)
    assert server.figure("live_pages") == 0
    assert server.figure("free_pages") + server.figure("cached_pages") == server.figure("pages")


def test_clients_that_leave_leave_nothing(server: Process) -> None:
    for _ in range(4):
        leave_in_crowds(server, 20)
    wait_until_idle(server)
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200


@pytest.mark.slow
def test_a_thousand_clients_that_leave_leave_no_memory_behind(server: Process) -> None:
    memory = psutil.Process(server.process.pid)
    leave_in_crowds(server, 50)
    wait_until_idle(server)
    before = memory.memory_info().rss
    files = memory.num_fds()
    for _ in range(20):
        leave_in_crowds(server, 50)
    wait_until_idle(server)
    assert memory.memory_info().rss < 1.1 * before
    assert memory.num_fds() <= files + 2
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
    assert server.end()[0] == 0


def test_sigterm_under_load_ends_in_time(server: Process) -> None:
    clients = [threading.Thread(target=stream_again_and_again, args=(server,), daemon=True) for _ in range(12)]
    for client in clients:
        client.start()
    deadline = time.monotonic() + 20
    while server.figure("running") < 4:
        assert time.monotonic() < deadline
    begun = time.monotonic()
    code, log = server.end()
    assert code == 0 and time.monotonic() - begun < 15, log
    assert "Traceback" not in log


def stream_again_and_again(server: Process) -> None:
    with contextlib.suppress(OSError, pytest.fail.Exception):
        while True:
            server.stream_and_leave(max_tokens=4000)


def test_a_stream_that_outlives_the_drain_time_ends_in_order(server: Process) -> None:
    fields = {"regex": "[a-z]{100000}"}
    body = json.dumps({"prompt": "x", "max_tokens": 50_000, "stream": True, "structured_outputs": fields}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"x-api-key: {KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        received = connection.recv(4096)
        server.process.send_signal(signal.SIGTERM)
        while piece := connection.recv(65536):
            received = received[-4096:] + piece
    assert b'data: {"error":' in received and b"data: [DONE]" in received and received.endswith(b"0\r\n\r\n")
    assert server.wait() == 0 and "Traceback" not in server.log()


def test_a_public_address_without_keys_is_refused() -> None:
    process = Process("--host", "0.0.0.0")
    assert process.wait() == 2 and "refusing to listen on '0.0.0.0' without API keys" in process.log()


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    port = free_port()
    command = [sys.executable, "-c", "from indexshare.cli import main; main()"]
    done = subprocess.run(
        [*command, "serve", str(tmp_path), "--port", str(port)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ},
        check=False,
    )
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert "listening" not in done.stderr


@pytest.mark.slow
def test_generated_requests_never_break_the_server_with_a_model(server: Process) -> None:
    """schemathesis over the document that the server gives out, against the model and the engine behind it."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("st")), "run", f"http://127.0.0.1:{server.port}/openapi.json"),
            *("--header", f"x-api-key: {KEY}", "--checks", "not_a_server_error", "--max-examples", "40", "--seed", "1"),
            *("--phases", "fuzzing", "--request-timeout", "60", "--no-color"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    wait_until_idle(server)
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
    code, log = server.end()
    assert code == 0 and "Traceback" not in log
