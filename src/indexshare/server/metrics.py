"""Prometheus metrics of the server and, read when somebody asks, of the engine."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from indexshare.chat.types import Done
from indexshare.engine.sampler import SampledToken
from indexshare.server.logs import RequestRecord, current_record
from indexshare.server.types import ChatRequest, CompletionRequest, Piece, Reply, Service

EngineStats = Mapping[str, Any]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

ENGINE_METRICS: dict[str, tuple[type[GaugeMetricFamily | CounterMetricFamily], str, tuple[str, ...]]] = {
    "waiting": (GaugeMetricFamily, "Requests that wait.", ()),
    "running": (GaugeMetricFamily, "Requests that are being computed.", ()),
    "pages": (GaugeMetricFamily, "Pages of the cache.", ()),
    "free_pages": (GaugeMetricFamily, "Pages that hold nothing.", ()),
    "live_pages": (GaugeMetricFamily, "Pages of running requests.", ()),
    "cached_pages": (GaugeMetricFamily, "Pages kept for later requests with the same beginning.", ()),
    "cache_bytes": (GaugeMetricFamily, "Memory of the cache.", ()),
    "mixed_tokens": (GaugeMetricFamily, "Tokens of a step that reads prompts while others are answered.", ()),
    "evicted_pages": (CounterMetricFamily, "Cached pages that were given up.", ()),
    "preempted": (CounterMetricFamily, "Running requests that had to give up their pages.", ()),
    "requests": (CounterMetricFamily, "Requests that have ended.", ()),
    "steps": (CounterMetricFamily, "Forward passes.", ()),
    "step_seconds": (CounterMetricFamily, "Time in forward passes.", ()),
    "prompt_tokens": (CounterMetricFamily, "Prompt tokens that were computed.", ()),
    "cached_tokens": (CounterMetricFamily, "Prompt tokens that were found in the cache.", ()),
    "drawn_tokens": (CounterMetricFamily, "Tokens that were drawn.", ()),
    "drafted": (CounterMetricFamily, "Tokens drafted, by position in the draft.", ("position",)),
    "accepted": (CounterMetricFamily, "Drafted tokens that were right, by position in the draft.", ("position",)),
    "expert_tokens": (CounterMetricFamily, "Tokens that an expert computed.", ("layer", "expert")),
}
"""What `Engine.stats` may report: kind, explanation, labels. Other numbers are gauges without an explanation.

A value with labels is a mapping or a sequence, nested once for each label.
"""


class Metrics:
    """All metrics of one server, in a registry of its own. `engine_stats`: called for each scrape, from any thread."""

    def __init__(self, engine_stats: Callable[[], EngineStats] | None = None) -> None:
        disable_created_metrics()  # a second series for each, which nobody reads
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "indexshare_requests", "Requests answered.", ["route", "method", "status"], registry=self.registry
        )
        self.in_flight = Gauge("indexshare_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.request_seconds = Histogram(
            "indexshare_request_seconds",
            "From the request's head to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "indexshare_time_to_first_token_seconds",
            "From the request's head to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.token_seconds = Histogram(
            "indexshare_inter_token_seconds",
            "Between the steps of a reply, divided by the tokens of the step.",
            buckets=(0.001, 0.0025, *_SECONDS),
            registry=self.registry,
        )
        self.tokens = Counter("indexshare_tokens", "Tokens of requests, by kind.", ["kind"], registry=self.registry)
        if engine_stats is not None:
            self.registry.register(_EngineCollector(engine_stats))

    def request_started(self, record: RequestRecord) -> None:
        """For LogRequests."""
        self.in_flight.inc()

    def request_ended(self, record: RequestRecord) -> None:
        """For LogRequests. Paths that do not exist count as one route: a stranger can not make up series."""
        route = record.route or "unknown"
        self.in_flight.dec()
        self.requests.labels(route, record.method, str(record.status)).inc()
        self.request_seconds.labels(route).observe(record.seconds)

    def reply_ended(self, reply: Reply, num_completion_tokens: int) -> None:
        """A reply is over, complete or not."""
        record = current_record.get()
        counts = (reply.num_prompt_tokens, reply.num_cached_tokens, num_completion_tokens)
        for kind, count in zip(("prompt", "cached", "completion"), counts, strict=True):
            self.tokens.labels(kind).inc(count)
        if record is not None:  # n > 1 makes several replies for one request
            record.num_prompt_tokens += counts[0]
            record.num_cached_tokens += counts[1]
            record.num_completion_tokens += counts[2]

    async def render(self) -> bytes:
        """The text format, made in a thread: it takes milliseconds, and the engine's counters may wait for a lock."""
        return await asyncio.to_thread(generate_latest, self.registry)


class _EngineCollector(Collector):
    def __init__(self, engine_stats: Callable[[], EngineStats]) -> None:
        self.engine_stats = engine_stats

    def describe(self) -> Iterator[Any]:
        return iter(())  # so that registering does not ask the engine

    def collect(self) -> Iterator[Any]:
        for name, value in self.engine_stats().items():
            kind, explanation, labels = ENGINE_METRICS.get(name, (GaugeMetricFamily, name, ()))
            family = kind(f"indexshare_engine_{name}", explanation, labels=labels)
            for label_values, number in _leaves(value, len(labels)):
                family.add_metric(label_values, number)
            yield family


def _leaves(value: Any, depth: int) -> Iterator[tuple[list[str], float]]:
    """The numbers in mappings nested `depth` deep, each with the keys that lead to it."""
    if depth == 0:
        yield [], float(value)
        return
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        for keys, number in _leaves(inner, depth - 1):
            yield [str(key), *keys], number


def observed(service: Service, metrics: Metrics) -> Service:
    """`service`, with the tokens and times of its replies counted in `metrics` and in the request's log line."""
    return cast(Service, _ObservedService(service, metrics))


class _ObservedService:
    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)

    async def chat(self, request: ChatRequest, *, tenant: str) -> Reply:
        return _ObservedReply(reply=await self._service.chat(request, tenant=tenant), metrics=self._metrics)

    async def complete(self, request: CompletionRequest, *, tenant: str) -> Reply:
        return _ObservedReply(reply=await self._service.complete(request, tenant=tenant), metrics=self._metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ObservedReply:
    reply: Reply
    metrics: Metrics

    @property
    def num_prompt_tokens(self) -> int:
        return self.reply.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        return self.reply.num_cached_tokens

    @property
    def prompt_tokens(self) -> Sequence[SampledToken]:
        return self.reply.prompt_tokens

    async def pieces(self) -> AsyncGenerator[Piece]:
        record = current_record.get()
        previous = record.started if record is not None else time.perf_counter()
        num_tokens, histogram = 0, self.metrics.first_token_seconds
        try:
            async with aclosing(self.reply.pieces()) as pieces:
                async for piece in pieces:
                    if piece.tokens:
                        now = time.perf_counter()
                        first = histogram is self.metrics.first_token_seconds
                        histogram.observe((now - previous) / (1 if first else len(piece.tokens)))
                        previous, histogram = now, self.metrics.token_seconds
                        num_tokens += len(piece.tokens)
                    last = piece.events[-1] if piece.events else None
                    if isinstance(last, Done) and last.usage is not None:
                        num_tokens = last.usage.num_completion_tokens
                    yield piece
        finally:
            self.metrics.reply_ended(self.reply, num_tokens)
