"""A dialect in a bare application, and the ways tests talk to it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
from server.scripted import ScriptedReply, ScriptedService
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.chat.types import Done, Event, FinishReason, Start, Usage
from indexshare.errors import IndexShareError
from indexshare.server.http import ApiError, as_api_error, error_response
from indexshare.server.types import ChatRequest, CompletionRequest, Piece, Service

MODEL = "scripted"
USAGE = Usage(num_prompt_tokens=7, num_completion_tokens=5, num_cached_tokens=3)


def reply_of(*events: Event, reason: FinishReason = "stop") -> list[Piece]:
    """One event a piece, between Start and Done."""
    middle = [Piece(events=(event,)) for event in events]
    return [Piece(events=(Start(7),)), *middle, Piece(events=(Done(reason, USAGE),))]


def application(routes: Callable[[Service], list[Route]], service: Service) -> Starlette:
    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError | IndexShareError)
        answer = error if isinstance(error, ApiError) else as_api_error(error)
        return error_response(request.scope["path"], answer, "req_test")

    return Starlette(routes=routes(service), exception_handlers={ApiError: on_error, IndexShareError: on_error})


def http_client(
    routes: Callable[[Service], list[Route]], service: Service, *, tenant: str | None = None
) -> httpx2.AsyncClient:
    bare = application(routes, service)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await bare({**scope, "state": {} if tenant is None else {"tenant": tenant}}, receive, send)

    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1")


async def post(
    routes: Callable[[Service], list[Route]],
    service: Service,
    path: str,
    body: dict[str, Any],
    *,
    tenant: str | None = None,
) -> httpx2.Response:
    async with http_client(routes, service, tenant=tenant) as client:
        return await client.post(path, json=body)


def post_now(routes: Callable[[Service], list[Route]], service: Service, path: str, body: dict[str, Any]) -> Any:
    """The status and the JSON of an answer."""
    response = asyncio.run(post(routes, service, path, body))
    return response.status_code, response.json()


def read_events(body: str) -> list[dict[str, Any]]:
    """The objects of a stream, each of which must have exactly an `event` line that is its type, and a `data` line."""
    events = []
    for block in body.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


@dataclass
class StuckReply(ScriptedReply):
    """Plays its script and then waits until it is closed."""

    stuck: asyncio.Event = field(default_factory=asyncio.Event)

    async def pieces(self) -> AsyncIterator[Piece]:
        try:
            for piece in self.script:
                yield piece
            self.stuck.set()
            await asyncio.Event().wait()
        finally:
            self.closed = True


@dataclass
class StuckService(ScriptedService):
    def _reply(self, request: ChatRequest | CompletionRequest, tenant: str) -> ScriptedReply:
        self.replies.append(StuckReply(self.script(request)))
        return self.replies[-1]


async def leave_when_stuck(
    routes: Callable[[Service], list[Route]], service: StuckService, path: str, body: dict[str, Any]
) -> Sequence[bytes]:
    """Post `body`, go away when the reply waits, and return what had come by then."""
    incoming = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        message = next(incoming, None)
        if message is None:
            reply = service.replies[0]
            assert isinstance(reply, StuckReply)
            await reply.stuck.wait()
            return {"type": "http.disconnect"}
        return message

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await application(routes, service)(scope, receive, send)  # type: ignore[arg-type]
    return [body for body in sent if body]
