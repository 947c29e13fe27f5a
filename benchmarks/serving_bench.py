"""What every part of serving.py needs: the model, the servers, and a load on one of them while the machine is quiet."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import quiet
from quiet import Patience
from serving_client import Load, Plan, drive
from serving_model import Served
from serving_report import OTHERS, Run
from serving_servers import Server, our_server


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured; prompts and replies in tokens."""

    clients: Sequence[int] = (1, 4, 16, 64)
    short_prompt: int = 128
    short_reply: int = 64
    long_prompt: int = 32_768
    num_beside: int = 4
    num_latencies: int = 50
    llama_prompt: int = 8192
    llama_clients: Sequence[int] = (1, 4)
    draft_document: int = 4096
    draft_reply: int = 128

    @property
    def cache_tokens(self) -> int:
        """Room for the long prompt twice, beside all the others."""
        return 2 * self.long_prompt + 2 * max(self.clients) * (self.short_prompt + self.short_reply) + 16_384


QUICK = Sizes(
    clients=(1, 4),
    short_reply=16,
    long_prompt=4096,
    num_latencies=10,
    llama_prompt=1024,
    draft_document=1024,
    draft_reply=32,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Something to measure, once for each repeat. weight: seconds it may take, for the estimate of what is left."""

    name: str
    weight: float
    run: Callable[[], None]


class Bench:
    """One run: where it is measured, and what is found."""

    def __init__(self, served: Served, sizes: Sizes, run: Run, *, work: Path, threads: int, patience: float) -> None:
        self.served, self.sizes, self.run = served, sizes, run
        self.work, self.threads = work, threads
        self._patience = Patience(patience)
        self._seeds = count(1)
        self._servers: dict[int, Server] = {}
        self._stack = ExitStack()

    def prompt(self, num_tokens: int) -> list[int]:
        """Random token ids that nobody has sent before."""
        return self.served.prompt(next(self._seeds), num_tokens)

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"serving-{self.run.model}-{name}.log"

    def server(self, num_drafts: int = 0) -> Server:
        """Our server with so many drafts at most, started when it is first asked for."""
        if num_drafts not in self._servers:
            name = f"draft-{num_drafts}"
            server = our_server(
                self.served.name,
                self.log(name),
                name=name,
                threads=self.threads,
                draft=num_drafts,
                cache_tokens=self.sizes.cache_tokens,
            )
            self._servers[num_drafts] = self._stack.enter_context(server)
            with self.others_paused(server):
                self.warm_up(server.wait())
        return self._servers[num_drafts]

    def warm_up(self, server: Server) -> None:
        """What a first prompt and a first batch allocate."""
        drive(Plan(port=server.port, clients=[[body(self.prompt(600), 8)] for _ in range(4)]))

    @contextmanager
    def others_paused(self, server: Server | None) -> Generator[None]:
        """Every server but this one stands still."""
        others = [other for other in self._servers.values() if other is not server]
        for other in others:
            other.pause()
        try:
            yield
        finally:
            for other in others:
                other.resume()

    def close_servers(self) -> None:
        self._stack.close()
        self._servers.clear()

    def drive(
        self, server: Server, clients: Sequence[Sequence[dict[str, Any]]], **plan: Any
    ) -> tuple[Load, dict[str, float]]:
        """The load, and two figures about it: what the clients and what other programs had of the processors."""
        with self.others_paused(server):
            self._patience.wait()
            begun, used, busy = time.perf_counter(), _own_seconds() + server.cpu_seconds, quiet.busy_seconds()
            load = drive(Plan(port=server.port, clients=clients, **plan))
            elapsed = time.perf_counter() - begun
            others = quiet.busy_seconds() - busy - (_own_seconds() + server.cpu_seconds - used)
        share = max(0.0, others - quiet.CLOCK_SECONDS) / (quiet.NUM_PROCESSORS * elapsed)
        return load, {"clients' CPU %": 100 * load.cpu_seconds / load.seconds, OTHERS: 100 * share}


def body(prompt: Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    """A request for greedy tokens, streamed, with the counts at its end."""
    fixed = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    return {"prompt": prompt, "max_tokens": max_tokens, **fixed, **more}


def _own_seconds() -> float:
    """Processor time of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
