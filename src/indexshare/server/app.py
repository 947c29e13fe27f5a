"""The application: every route behind the same checks, and errors in the dialect of the path."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from indexshare.errors import ConfigError, IndexShareError
from indexshare.server import basics
from indexshare.server.http import ApiError, as_api_error, error_response
from indexshare.server.limits import BodyLimits, LimitRequests
from indexshare.server.logs import LogRequests
from indexshare.server.metrics import Metrics, observed
from indexshare.server.openapi import openapi_document
from indexshare.server.security import CheckHostAndOrigin, RequireKey, StampResponses, check_exposure
from indexshare.server.types import Service


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a server is reached, by whom, and how much it takes. Raises ConfigError when that would be unsafe.

    api_keys: key to tenant (security.load_api_keys). allowed_hosts: names besides loopback and the address of the
    connection. allowed_origins: web pages, such as "https://example.org". Times are in seconds: head for the head of a
    request, write for a client that does not read, idle for a connection without requests, drain for replies that are
    running when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    body: BodyLimits = field(default_factory=BodyLimits)
    max_connections: int = 512
    max_head_bytes: int = 32 * 1024
    head_seconds: float = 10.0
    write_seconds: float = 60.0
    idle_seconds: int = 30
    drain_seconds: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port must be from 0 (any free one) to 65,535, not {self.port}")
        check_exposure(self.host, self.api_keys)


def create_app(
    service: Service,
    settings: ServerSettings,
    *,
    metrics: Metrics | None = None,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None,
    readiness: Callable[[], str | None] = lambda: None,
    extra_routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """The ASGI application. `readiness`: None, or the reason why the model can not answer yet (`/ready`).

    lifespan: entered before the first request and left after the last one, in the server's event loop.
    extra_routes stand behind the same checks as all others.
    """
    from indexshare.server import chat_completions, completions, messages, page, responses, tokens

    metrics = metrics or Metrics()
    watched = observed(service, metrics)
    dialects = (chat_completions, completions, responses, messages, tokens)
    routes: list[BaseRoute] = [route for dialect in dialects for route in dialect.routes(watched)]
    routes += extra_routes

    @cache
    def openapi() -> dict[str, Any]:
        return openapi_document(routes, needs_key=bool(settings.api_keys))

    routes += basics.routes(readiness=readiness, metrics=metrics, openapi=openapi)
    routes += page.routes()
    public = frozenset(page.FILES)
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=_middleware(settings, metrics, public),
        exception_handlers={ApiError: _answer_error, IndexShareError: _answer_error, HTTPException: _answer_error},
    )
    app.router.redirect_slashes = False  # a redirect would be built from the client's Host header
    return app


def _middleware(settings: ServerSettings, metrics: Metrics, public: frozenset[str]) -> list[Middleware]:
    """From the outside in. Each one is cheaper to pass than what it protects."""
    origins = list(settings.allowed_origins)
    cross_origin = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )
    return [
        Middleware(StampResponses),
        Middleware(LogRequests, on_start=metrics.request_started, on_end=metrics.request_ended),
        Middleware(CheckHostAndOrigin, allowed_hosts=settings.allowed_hosts, allowed_origins=origins, public=public),
        *([cross_origin] if origins else []),
        Middleware(RequireKey, keys=settings.api_keys, public=public | {"/health"}),
        Middleware(LimitRequests, limits=settings.body),
    ]


async def _answer_error(request: Request, error: Exception) -> Response:
    """ApiError, what the service raises, and Starlette's own 404 and 405, in the dialect of the path."""
    headers: Mapping[str, str] = {}
    if isinstance(error, HTTPException):
        headers = error.headers or {}
        text = {404: "there is no such path", 405: "the path does not know this method"}
        error = ApiError(error.status_code, f"{text.get(error.status_code, error.detail)}; see /openapi.json")
    elif isinstance(error, IndexShareError):
        if as_api_error(error).status >= 500:
            raise error  # not for the client to read: LogRequests writes it down
        error = as_api_error(error)
    assert isinstance(error, ApiError)
    response = error_response(request.scope["path"], error, request.state.request_id)
    response.headers.update(headers)
    return response
