"""Requests in, responses out: strict JSON bodies, server-sent events, and errors in the dialect of the path."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from indexshare.errors import IndexShareError, MemoryLimitError, OverloadedError, RequestError, TemplateError

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]

MAX_JSON_DEPTH = 64
MAX_JSON_VALUES = 2_000_000  # a prompt of a million token ids fits; 32 MiB of empty lists would take 700 MB
MAX_MESSAGE_CHARACTERS = 300
KEEP_ALIVE_SECONDS = 10.0

# A JSON string, or the rest of the body if it never ends: each byte is looked at once, whatever the body.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DEPTH_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}

_ANTHROPIC_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
_OPENAI_ERRORS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200. `param`: the field that is wrong; `code`: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.details = details
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Documentation:
    """What /openapi.json says about a handler. body, response: msgspec Structs. stream: it can answer with events."""

    summary: str
    body: Any = None
    response: Any = None
    stream: bool = False


def documented(
    *, summary: str, body: Any = None, response: Any = None, stream: bool = False
) -> Callable[[Handler], Handler]:
    """Decorate a handler with what openapi.py shall say about it."""

    def note(handler: Handler) -> Handler:
        handler.__dict__["documentation"] = Documentation(summary=summary, body=body, response=response, stream=stream)
        return handler

    return note


def documentation(handler: object) -> Documentation | None:
    """What `documented` noted on `handler`."""
    return getattr(handler, "documentation", None)


async def read_json(request: Request, kind: type[T]) -> T:
    """The body as `kind` (a msgspec Struct).

    Raises ApiError: 415 for another content type or a compressed body, 400 that names the field for everything else.
    The bytes are counted, and the wait for them is limited, where they come in (limits.py).
    """
    _check_content_type(request)
    body = await request.body()
    if not body:
        raise ApiError(400, "the body is empty; send a JSON object")
    check_json_size(body)
    try:
        return msgspec.json.decode(body, type=kind)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start} of a string)") from error
    except msgspec.DecodeError as error:
        raise ApiError(400, str(error), param=_field_of(str(error))) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error


def _check_content_type(request: Request) -> None:
    """A browser sends JSON to another site only after asking, so this also keeps forms of strange pages out."""
    media_type, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    if media_type.strip() != "application/json" or parameters.strip().replace('"', "") not in ("", "charset=utf-8"):
        raise ApiError(415, "the body must be JSON in UTF-8: send content-type: application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "compressed bodies are not read; send the body without content-encoding")


def check_json_size(body: bytes) -> None:
    """Refuse JSON that would be far larger in memory than on the wire, in linear time and before anything is decoded.

    Raises ApiError 400 beyond MAX_JSON_DEPTH or MAX_JSON_VALUES. Brackets and commas in strings do not count.
    """
    bare, num_strings = _STRING.subn(b"", body, MAX_JSON_VALUES)
    brackets = bare.translate(None, _NOT_BRACKETS)
    if max(num_strings, bare.count(b",") + len(brackets)) >= MAX_JSON_VALUES:
        raise ApiError(400, f"the body has more than {MAX_JSON_VALUES:,} values")
    if max(accumulate(map(_DEPTH_STEP.__getitem__, brackets)), default=0) > MAX_JSON_DEPTH:
        raise ApiError(400, f"the body is nested more than {MAX_JSON_DEPTH} levels deep")


def _field_of(message: str) -> str | None:
    """The field in msgspec's message: "... - at `$.messages[0].role`", or "... unknown field `x`" at the top."""
    place = re.search(r" - at `\$\.?([^`]{1,100})`$", message)
    unknown = re.search(r"(?:unknown field|required field) `([^`]{1,100})`", message)
    parts = [found.group(1) for found in (place, unknown) if found]
    return ".".join(parts) or None


def json_response(value: Any, status: int = 200) -> Response:
    """`value` (a msgspec Struct, or plain data) as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def event_stream(chunks: AsyncIterator[bytes], *, keep_alive_seconds: float = KEEP_ALIVE_SECONDS) -> Response:
    """A response of server-sent events; `chunks` are whole events.

    A comment is sent when nothing else was for `keep_alive_seconds`, so that nobody between gives up during a long
    prefill. `chunks` is closed, and that awaited, when it ends, fails or the client goes, silent or not.
    """
    return _EventStream(chunks, keep_alive_seconds)


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], keep_alive_seconds: float) -> None:
        self.chunks, self.keep_alive_seconds = chunks, keep_alive_seconds
        self.status_code = 200
        self.background = None
        # The last header asks nginx not to collect the events.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(max(0.0, last + self.keep_alive_seconds - loop.time()))
                if loop.time() >= last + self.keep_alive_seconds:
                    await send_chunk(b": keep-alive\n\n")

        async def send_chunk(chunk: bytes) -> None:
            nonlocal last
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            last = loop.time()

        # A task beside the loop and not one for each chunk: those would cost more than the chunks.
        ticker: asyncio.Task[None] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            ticker = asyncio.create_task(keep_alive())
            async for chunk in self.chunks:
                await send_chunk(chunk)
        finally:
            if ticker is not None:
                ticker.cancel()
            if (close := getattr(self.chunks, "aclose", None)) is not None:
                await close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def run_while_connected(receive: Receive, work: Awaitable[None]) -> bool:
    """Await `work` in this task, and cancel it when `receive` says that the client is gone.

    Returns whether the client stayed. Cancelled once, as asyncio does it, so that what `work` awaits while it cleans
    up is not cancelled again.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        await work
    except asyncio.CancelledError:
        if not gone:
            raise
    finally:
        watcher.cancel()
        if gone and task.uncancel():
            raise asyncio.CancelledError  # somebody else, such as the server at its end, cancelled as well
    return not gone


def as_api_error(error: IndexShareError) -> ApiError:
    """The HTTP form of what the service raises."""
    match error:
        case OverloadedError():
            return ApiError(429, str(error), code="overloaded", retry_after=error.retry_after)
        case MemoryLimitError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case RequestError() | TemplateError():
            return ApiError(400, str(error))
        case _:
            return ApiError(500, "internal error")


def error_response(path: str, error: ApiError, request_id: str) -> Response:
    """`error` in the dialect that `path` (the raw ASGI path) speaks. The message is shortened to 300 characters."""
    message = _shorten(error.message)
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        body: Any = {
            "type": "error",
            "error": {"type": kind, "message": message, **({"details": error.details} if error.details else {})},
            "request_id": request_id,
        }
    else:
        kind = _OPENAI_ERRORS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
        param = error.param and error.param[:100]
        body = {"error": {"message": message, "type": kind, "param": param, "code": error.code}}
    response = json_response(body, error.status)
    if error.retry_after is not None:
        response.headers["retry-after"] = str(max(1, round(error.retry_after)))
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def _shorten(message: str) -> str:
    """At most MAX_MESSAGE_CHARACTERS, cut in the middle: what was wrong stands first and what to do last."""
    message = message.encode("utf-8", "replace").decode()  # lone surrogates could not be sent
    if len(message) <= MAX_MESSAGE_CHARACTERS:
        return message
    return f"{message[:199]} ... {message[-96:]}"
