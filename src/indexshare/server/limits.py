"""Bodies of bounded size, that come in time, and handlers that stop when their client is gone."""

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from indexshare.server.http import ApiError, run_while_connected

MIN_BODY_RATE = 64 * 1024  # bytes a second, after the first `body_seconds`


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """max_body_bytes: of one request. max_total_bytes: of all requests that are being answered. body_seconds: how long
    a body may take, not counting a second for every 64 KiB that came."""

    max_body_bytes: int = 32 * 2**20
    max_total_bytes: int = 256 * 2**20
    body_seconds: float = 30.0


class LimitRequests:
    """ASGI middleware. A handler that reads a body beyond the limits gets an ApiError: 413, 408 or 503.

    Nothing is read before the handler asks, so a request that is refused for another reason costs no memory.
    When the body is complete, the handler is cancelled as soon as its client goes away.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self.app = app
        self.limits = limits
        self.total_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(self, scope, receive)
        try:
            await run_while_connected(body.after_body, self.app(scope, body.receive, send))
        finally:
            self.total_bytes -= body.num_bytes


class _Body:
    """The body of one request: `receive` for the handler, `after_body` for whoever waits for the client to go."""

    def __init__(self, owner: LimitRequests, scope: Scope, receive: Receive) -> None:
        self.owner = owner
        self.declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        self.from_client = receive
        self.num_bytes = 0
        self.started: float | None = None
        self.complete = asyncio.Event()

    async def receive(self) -> Message:
        if self.complete.is_set():
            await asyncio.Event().wait()  # only a disconnect can come, and that cancels the handler
        limits = self.owner.limits
        if not self.declared.isdigit() or len(self.declared) > 18:
            raise ApiError(400, "content-length must be a number")
        self._check_size(int(self.declared))
        if self.started is None:
            self.started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(self.started + limits.body_seconds + self.num_bytes / MIN_BODY_RATE):
                message = await self.from_client()
        except TimeoutError as error:
            raise ApiError(408, "the body came too slowly") from error
        if message["type"] == "http.request":
            num_bytes = len(message.get("body", b""))
            self.num_bytes += num_bytes
            self.owner.total_bytes += num_bytes
            self._check_size(self.num_bytes)
            if self.owner.total_bytes > limits.max_total_bytes:
                raise ApiError(503, "too many large requests at once; try again later", retry_after=2)
            if not message.get("more_body", False):
                self.complete.set()
        return message

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > (largest := self.owner.limits.max_body_bytes):
            raise ApiError(413, f"the body is larger than {largest:,} bytes, the limit of this server")

    async def after_body(self) -> Message:
        await self.complete.wait()
        return await self.from_client()
