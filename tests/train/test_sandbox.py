"""Programs that try to get out, to stay or to use up the machine. They need bubblewrap to run at all."""

import os
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from indexshare.errors import ConfigError
from indexshare.train import sandbox
from indexshare.train.sandbox import Limits, Outcome, require_sandbox, run_python


@pytest.fixture
def working_sandbox() -> None:
    try:
        require_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))


needs_sandbox = pytest.mark.usefixtures("working_sandbox")


def attempt(*statements: str) -> list[str]:
    """What each of some statements, run in one program, came to: "done", or the error that refused it."""
    program = "import os, socket, sys\n"
    for statement in statements:
        program += f"try:\n    {statement}\n    print('done')\nexcept OSError as error:\n    print('refused', error)\n"
    outcome = run_python(program)
    assert outcome.exit_code == 0, outcome
    return outcome.output.splitlines()


@needs_sandbox
def test_a_program_runs_with_its_files_and_its_own_folder() -> None:
    program = """
import sys
sys.path.insert(0, "/sandbox")
from given import value
open("note", "w").write("kept")
print(value, open("/tmp/note").read(), flush=True)
sys.stderr.write("said")
sys.exit(3)
"""
    outcome = run_python(program, files={"given.py": "value = 7"})
    assert outcome == Outcome(ended="exit", exit_code=3, output="7 kept\nsaid")
    assert run_python("import os; os.kill(os.getpid(), 11)").exit_code == -11
    assert attempt("open('/tmp/note')")[0].startswith("refused"), "each run has a folder of its own"


@needs_sandbox
def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 1).close()  # from here it can be reached
        results = attempt(
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "socket.create_connection(('1.1.1.1', 53), 1)",
            "socket.getaddrinfo('localhost.example', 80)",
        )
    assert all(line.startswith("refused") for line in results), results


@needs_sandbox
def test_nothing_of_the_host_is_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    monkeypatch.setenv("SANDBOX_SECRET", "hidden")
    assert "SECRET" not in run_python("import os; print(os.environ)").output
    files = [str(secret), "/etc/passwd", "/proc/self/environ", "/proc/1/environ", __file__]
    folders = [str(tmp_path), "/", "/sandbox", "/dev", "/dev/shm", "/usr/lib", os.path.realpath(sys.base_prefix)]
    attempts = [f"open({file!r}).read()" for file in files] + [f"open({place + '/new'!r}, 'w')" for place in folders]
    for statement, result in zip(attempts, attempt(*attempts), strict=True):
        assert result.startswith("refused"), statement
    assert attempt("open('/tmp/new', 'w').write('x')") == ["done"]
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


@needs_sandbox
def test_no_rights_can_be_gained() -> None:
    program = """
import ctypes, os
library = ctypes.CDLL(None)
print(library.unshare(0x10000000), library.mount(b"none", b"/tmp", b"tmpfs", 0, 0), os.getuid(), os.getpid() < 10)
"""
    assert run_python(program).output.split() == ["-1", "-1", "65534", "True"]


@needs_sandbox
def test_a_fork_bomb_makes_no_process() -> None:
    calls = ("os.fork()", "os.posix_spawn(sys.executable, [sys.executable], {})", "os.forkpty()")
    assert all(line.startswith("refused") for line in attempt(*calls))
    clone, sigchld = {"x86_64": 56, "aarch64": 220}[os.uname().machine], 17
    raw = (
        f"import ctypes; call = ctypes.CDLL(None).syscall; print(call({clone}, {sigchld}, 0, 0, 0, 0), call(435, 0, 0))"
    )
    assert run_python(raw).output.split() == ["-1", "-1"]


@needs_sandbox
def test_threads_run_but_not_without_end() -> None:
    program = """
import threading, time
threading.Thread(target=lambda: print("one")).start()
count = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        count += 1
except RuntimeError:
    print("limit", 10 < count < 1000)
"""
    assert run_python(program).output == "one\nlimit True\n"


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "ended", "says"),
    [
        ("bytearray(10**9)", "exit", "MemoryError"),
        ("open('a', 'wb').write(bytes(17 * 2**20))", "exit", "File too large"),
        ("for i in range(20): open(str(i), 'wb').write(bytes(2**20))", "exit", "No space left"),
        ("while True: print('y' * 1000)", "output", "yyy"),
        ("print('begun', flush=True)\nwhile True: pass", "time", "begun"),
        ("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)", "time", ""),
        ("import signal\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass", "time", ""),
    ],
)
def test_limits_hold_and_nothing_survives(program: str, ended: str, says: str) -> None:
    began, before = time.monotonic(), set(psutil.Process().children(recursive=True))  # other tests may have some
    outcome = run_python(program, limits=Limits(seconds=1.0 if ended == "time" else 30.0))
    assert (outcome.ended, says in outcome.output) == (ended, True), outcome
    assert len(outcome.output) <= Limits().output_bytes
    assert time.monotonic() - began < 20
    assert set(psutil.Process().children(recursive=True)) <= before


def test_without_bubblewrap_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    require_sandbox.cache_clear()
    with pytest.raises(ConfigError, match="install the package bubblewrap"):
        run_python("print(1)")
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho no permission to create a namespace >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ConfigError, match=r"cannot make a sandbox here(.|\n)*no permission to create a namespace"):
        run_python("print(1)")
    require_sandbox.cache_clear()


def test_an_unknown_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="knows x86_64, aarch64, not riscv64"):
        list(sandbox._filter())
