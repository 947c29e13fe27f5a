"""What every service has: is it alive, is it ready, what does it count, what can it do."""

from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.server.http import documented, json_response
from indexshare.server.metrics import Metrics


class Health(msgspec.Struct):
    """The process answers."""

    status: str = "ok"


class Readiness(msgspec.Struct):
    """`reason`: why requests can not be answered yet, "" when they can (200; otherwise 503)."""

    ready: bool
    reason: str = ""


def routes(
    *, readiness: Callable[[], str | None], metrics: Metrics, openapi: Callable[[], dict[str, Any]]
) -> list[Route]:
    """`readiness` returns None, or the reason why the model can not answer yet. `openapi`: the document."""

    @documented(summary="Is the process alive? Needs no API key and tells nothing else", response=Health)
    async def health(request: Request) -> Response:
        return json_response(Health())

    @documented(summary="Can the model answer? 503 with the reason while it can not", response=Readiness)
    async def ready(request: Request) -> Response:
        reason = readiness()
        return json_response(Readiness(ready=reason is None, reason=reason or ""), 200 if reason is None else 503)

    @documented(summary="Metrics in Prometheus' text format")
    async def scrape(request: Request) -> Response:
        return Response(await metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    @documented(summary="This document")
    async def describe(request: Request) -> Response:
        return json_response(openapi())

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", scrape),
        Route("/openapi.json", describe),
    ]
