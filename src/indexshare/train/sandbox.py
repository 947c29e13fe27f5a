"""Programs that a model wrote, run where they can do no harm: bubblewrap, resource limits and a system-call filter.

The program sees the interpreter and the system's libraries, read-only, and an empty /tmp of its own. It has no network,
no /proc, no host files, no capabilities and namespaces of its own. The filter refuses new processes (threads are
allowed), because RLIMIT_NPROC does not hold for root; so the limit on memory holds for all that runs.
"""

import math
import os
import platform
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Literal

from indexshare.errors import ConfigError

WORK = "/sandbox"  # where the program's files lie, read-only
_SYSTEM = ("/bin", "/lib", "/lib64", "/usr/lib", "/usr/lib64")
# Sets the limits in the sandbox and becomes the interpreter that reads the program from standard input.
_STARTER = """
import os, resource, sys
seconds, memory, disk, python = sys.argv[1:]
for kind, limit in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, disk),
    (resource.RLIMIT_NOFILE, 64),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(kind, (int(limit), int(limit)))
os.execv(python, [python, "-I", "-B", "-"])
"""

Ended = Literal["exit", "time", "output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use: seconds of wall and of processor time, bytes of address space, of /tmp, of output."""

    seconds: float = 5.0
    memory_bytes: int = 512 * 2**20
    disk_bytes: int = 16 * 2**20
    output_bytes: int = 64 * 2**10


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended: by itself (with exit_code, negative for a signal) or at a limit (exit_code is None).

    output: standard output and error together, as far as the limit allows.
    """

    ended: Ended
    exit_code: int | None
    output: str


@cache
def require_sandbox() -> None:
    """Raises ConfigError, saying what to install or to allow, when programs cannot be run safely here."""
    if shutil.which("bwrap") is None:
        raise ConfigError(
            "running generated programs needs bubblewrap, and there is no bwrap on this machine: install the package "
            "bubblewrap (apt, dnf or pacman), or choose a reward that runs no programs"
        )
    outcome = _run("print('ready')", {}, Limits(seconds=20.0))
    if outcome.output.strip() != "ready":
        raise ConfigError(
            "bubblewrap cannot make a sandbox here; programs are not run without one. It needs user namespaces "
            f"(sysctl user.max_user_namespaces and the container's seccomp profile). It said: {outcome.output[-300:]}"
        )


def run_python(program: str, *, files: Mapping[str, str] | None = None, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run a Python program in the sandbox, read in full from standard input before it starts.

    files: names to contents, read-only in WORK for the program to import or open. Raises ConfigError as
    `require_sandbox`; whatever the program does is an Outcome.
    """
    require_sandbox()
    return _run(program, files or {}, limits)


def _run(program: str, files: Mapping[str, str], limits: Limits) -> Outcome:
    with ExitStack() as stack:
        sources = {f"{WORK}/{name}": _temporary(stack, text.encode()) for name, text in files.items()}
        seccomp = _temporary(stack, b"".join(_filter()))
        python = os.path.realpath(sys.executable)
        numbers = (math.ceil(limits.seconds), limits.memory_bytes, limits.disk_bytes)
        process = subprocess.Popen(  # noqa: S603  # this is the way to run what is not trusted
            [
                *_command(sources, seccomp, limits.disk_bytes),
                *(python, "-I", "-S", "-c", _STARTER, *map(str, numbers), python),
            ],
            stdin=_temporary(stack, program.encode()),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(*sources.values(), seccomp),
            env={},
        )
        try:
            ended, output = _watch(process, limits)
        finally:
            process.kill()  # the namespace dies with bwrap, and everything in it
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
    text = output[: limits.output_bytes].decode(errors="replace")
    return Outcome(ended=ended, exit_code=_exit_code(process) if ended == "exit" else None, output=text)


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """bwrap reports a signal as 128 + its number."""
    code = process.returncode
    return 128 - code if code > 128 and code - 128 in signal.valid_signals() else code


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> tuple[Ended, bytes]:
    """Read the output until the program ends or reaches a limit."""
    assert process.stdout is not None
    deadline, output = time.monotonic() + limits.seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                break
            piece = os.read(process.stdout.fileno(), 65_536)
            output += piece
            if len(output) > limits.output_bytes:
                return "output", output
            if not piece:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:  # it closed its output and goes on
                    break
                return "exit", output
    return "time", output


def _temporary(stack: ExitStack, content: bytes) -> int:
    """The descriptor of a file without a name, at its beginning."""
    file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
    file.write(content)
    file.flush()
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return file.fileno()


def _command(sources: Mapping[str, int], seccomp: int, disk_bytes: int) -> list[str]:
    bwrap = shutil.which("bwrap")
    assert bwrap is not None
    arguments = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    arguments += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL", "--hostname", "sandbox"]
    for place in dict.fromkeys((*_SYSTEM, os.path.realpath(sys.base_prefix))):
        if os.path.islink(place):
            arguments += ["--symlink", os.readlink(place), place]
        elif place != "/bin" and os.path.isdir(place):
            arguments += ["--ro-bind", place, place]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dev", "/dev", "--dir", WORK]
    for place, descriptor in sources.items():
        arguments += ["--perms", "0444", "--ro-bind-data", str(descriptor), place]
    arguments += ["--perms", "0700", "--size", str(disk_bytes), "--tmpfs", "/tmp"]  # noqa: S108  # the sandbox's own
    arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]  # noqa: S108
    return [*arguments, "--seccomp", str(seccomp), "--"]


# machine: (AUDIT_ARCH, clone, other calls that make a process)
_CALLS = {"x86_64": (0xC000003E, 56, (57, 58)), "aarch64": (0xC00000B7, 220, ())}
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_X32 = 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM, ENOSYS


def _filter() -> Iterator[bytes]:
    """The system-call filter in classic BPF: no process is made, in this architecture's calls or another's.

    clone3 becomes unknown, since its flags lie in memory; the C library then uses clone.
    """
    machine = platform.machine()
    if machine not in _CALLS:
        raise ConfigError(f"the sandbox for generated programs knows {', '.join(_CALLS)}, not {machine}")
    architecture, clone, others = _CALLS[machine]

    def instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("=HBBI", code, then, otherwise, value)

    yield instruction(_LOAD, 4)  # seccomp_data.arch
    yield instruction(_EQUAL, architecture, 1, 0)
    yield instruction(_RETURN, _KILL)
    yield instruction(_LOAD, 0)  # seccomp_data.nr
    yield instruction(_AT_LEAST, _X32, 0, 1)
    yield instruction(_RETURN, _KILL)
    for number in others:
        yield instruction(_EQUAL, number, 0, 1)
        yield instruction(_RETURN, _REFUSE)
    yield instruction(_EQUAL, _CLONE3, 0, 1)
    yield instruction(_RETURN, _UNKNOWN)
    yield instruction(_EQUAL, clone, 0, 3)
    yield instruction(_LOAD, 16)  # the low half of the first argument, the flags
    yield instruction(_HAS_BITS, _CLONE_THREAD, 1, 0)
    yield instruction(_RETURN, _REFUSE)
    yield instruction(_RETURN, _ALLOW)
