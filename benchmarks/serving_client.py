"""Clients of a completions API, in a process of their own that costs little beside an engine that uses every processor.

`drive(plan)` starts the process and gives back what it saw. There, one connection for each client sends one request
after the other and notes when bytes arrive; JSON is read only after the last one. Requests must stream.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
NO_TEXT = (b'"text":""', b'"text": ""')
POLL_SECONDS = 0.005


class LoadError(RuntimeError):
    """A client could not do what its plan says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """clients: for each, its requests' bodies in order. With an intruder, each client repeats its requests for ever;
    when all have seen `num_before` arrivals the intruder's one request is sent, and all end when it is answered.
    reconnects: every request has a connection of its own, for servers that close them."""

    port: int
    clients: Sequence[Sequence[dict[str, Any]]]
    intruder: dict[str, Any] | None = None
    num_before: int = 0
    path: str = "/v1/completions"
    limit_seconds: float = 3600.0
    keeps_text: bool = False
    reconnects: bool = False


@dataclass(slots=True, kw_only=True)
class Answer:
    """One request. Times are in seconds since the plan began; arrivals: when text came, each instant once.

    num_tokens, num_prompt_tokens, num_cached_tokens: what the server counted; 0 for a request that was cut off.
    """

    client: int
    begun: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    status: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    text: str = ""

    @property
    def first_seconds(self) -> float:
        """Time to first token; to the end where no text came."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.begun

    @property
    def gaps(self) -> list[float]:
        """Seconds between arrivals."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a plan gave. seconds: from the first request to the last byte; cpu_seconds: what the clients used."""

    seconds: float
    cpu_seconds: float
    answers: list[Answer]
    intruder: Answer | None = None

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def first_seconds(self) -> list[float]:
        return [answer.first_seconds for answer in self.answers]

    @property
    def gaps(self) -> list[float]:
        return [gap for answer in self.answers for gap in answer.gaps]


def drive(plan: Plan) -> Load:
    """Carry out a plan in a process of its own. Raises LoadError unless every request was answered with 200."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # an interrupt from the keyboard reaches only the parent, which then ends it
    )
    try:
        output, errors = process.communicate(json.dumps(asdict(plan)).encode())
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise LoadError(errors.decode(errors="replace").strip() or f"the clients ended with {process.returncode}")
    found = json.loads(output)
    intruder = found.pop("intruder")
    return Load(
        **found | {"answers": [Answer(**answer) for answer in found["answers"]]},
        intruder=Answer(**intruder) if intruder else None,
    )


class Connection(asyncio.Protocol):
    """A connection that stays open; one request at a time."""

    def __init__(self, plan: Plan, clock: float) -> None:
        self._plan, self._clock = plan, clock
        self._head = f"POST {plan.path} HTTP/1.1\r\nhost: 127.0.0.1:{plan.port}\r\ncontent-type: application/json\r\n"
        self._payloads: list[bytes] = []

    @classmethod
    async def open(cls, plan: Plan, clock: float) -> "Connection":
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(plan, clock), "127.0.0.1", plan.port)
        return connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._done: asyncio.Future[None] | None = None

    def ask(self, client: int, body: bytes) -> tuple[Answer, Coroutine[Any, Any, None]]:
        """Send a request. The answer fills while the second value, which must be awaited, waits for its end."""
        self.answer = Answer(client=client, begun=time.perf_counter() - self._clock)
        self._rest, self._length = b"", None
        self._payloads = []
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return self.answer, self._finish()

    async def _finish(self) -> None:
        assert self._done is not None
        await self._done
        self.answer.ended = time.perf_counter() - self._clock
        if self.answer.status != 200:
            raise LoadError(f"status {self.answer.status}: {self._rest.decode(errors='replace')[:400]}")
        self._read_payloads()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter() - self._clock
        assert self._done is not None, "nothing was asked for"
        self._rest += data
        if not self.answer.status:
            head, found, rest = self._rest.partition(b"\r\n\r\n")
            if not found:
                return
            self.answer.status, self._rest = int(head[9:12]), rest
            length = LENGTH.search(head)
            self._length = int(length.group(1)) if length else None
        if self._length is None:
            # Both servers send whole events in a chunk, so that chunk headers never stand inside of one.
            events, found, rest = self._rest.rpartition(b"\n\n")
            if found:
                self._rest = rest
                for event in events.split(b"\n\n"):
                    self._note(event, now)
            is_done = self._rest.endswith(b"0\r\n\r\n")
        else:
            is_done = len(self._rest) >= self._length
        if is_done and not self._done.done():
            self._done.set_result(None)

    def _note(self, event: bytes, now: float) -> None:
        start = event.find(b"data: {")
        if start < 0:
            return  # a comment, or the end
        if b'"usage":{' in event or b'"error":{' in event or self._plan.keeps_text:
            self._payloads.append(event[start + 6 :])
        has_text = b'"text":' in event and not any(mark in event for mark in NO_TEXT)
        if has_text and (not self.answer.arrivals or self.answer.arrivals[-1] != now):
            self.answer.arrivals.append(now)

    def _read_payloads(self) -> None:
        for payload in map(json.loads, self._payloads):
            if "error" in payload:
                raise LoadError(f"the reply broke off: {payload['error']}")
            self.answer.text += "".join(choice.get("text", "") for choice in payload["choices"])
            if usage := payload.get("usage"):
                self.answer.num_tokens = usage["completion_tokens"]
                self.answer.num_prompt_tokens = usage["prompt_tokens"]
                self.answer.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(LoadError(f"the server closed the connection: {exc}"))

    def close(self) -> None:
        """Cut a running request off too."""
        self._done = None
        self._transport.abort()


async def carry_out(plan: Plan) -> Load:
    """The plan in this process."""
    scripts = [[json.dumps(body).encode() for body in bodies] for bodies in plan.clients]
    clock = time.perf_counter()
    connections = [await Connection.open(plan, clock) for _ in scripts]
    answers: list[Answer] = []

    async def follow(client: int) -> None:
        for body in scripts[client] if plan.intruder is None else cycle(scripts[client]):
            answer, end = connections[client].ask(client, body)
            answers.append(answer)
            await end
            if plan.reconnects:
                connections[client].close()
                connections[client] = await Connection.open(plan, clock)

    begun, cpu = time.perf_counter(), time.process_time()
    async with asyncio.timeout(plan.limit_seconds), asyncio.TaskGroup() as group:
        tasks = [group.create_task(follow(client)) for client in range(len(scripts))]
        intruder = None if plan.intruder is None else await _intrude(plan, clock, answers)
        if intruder is not None:
            for task in tasks:
                task.cancel()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    for connection in connections:
        connection.close()
    return Load(seconds=seconds, cpu_seconds=cpu, answers=answers, intruder=intruder)


async def _intrude(plan: Plan, clock: float, answers: list[Answer]) -> Answer:
    """Wait until every client sees text, then send the one request and wait for its end."""
    body, connection = json.dumps(plan.intruder).encode(), await Connection.open(plan, clock)

    def num_seen(client: int) -> int:
        return sum(len(answer.arrivals) for answer in answers if answer.client == client)

    while min(map(num_seen, range(len(plan.clients)))) < plan.num_before:
        await asyncio.sleep(POLL_SECONDS)
    answer, end = connection.ask(len(plan.clients), body)
    await end
    connection.close()
    return answer


def main() -> int:
    plan = Plan(**json.loads(sys.stdin.buffer.read()))
    try:
        import uvloop

        run = uvloop.run
    except ModuleNotFoundError:  # not on every system
        run = asyncio.run
    try:
        load = run(carry_out(plan))
    except ExceptionGroup as group:
        failures, others = group.split(LoadError)
        if failures is None or others is not None:
            raise
        print(failures.exceptions[0], file=sys.stderr)
        return 1
    except TimeoutError:
        print(f"not answered within {plan.limit_seconds:,.0f} seconds", file=sys.stderr)
        return 1
    json.dump(asdict(load), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
