"""Requests in, responses out: strict JSON bodies, server-sent events, and errors in the dialect of the path."""

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from indexshare.errors import IndexShareError, MemoryLimitError, OverloadedError, RequestError, TemplateError

T = TypeVar("T")


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
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after


async def read_json(request: Request, kind: type[T]) -> T:
    """The body as `kind` (a msgspec Struct). Raises ApiError 400 that names the field."""
    body = await request.body()
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, str(error)) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error


def json_response(value: Any, status: int = 200) -> Response:
    """`value` (a msgspec Struct, or plain data) as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def event_stream(chunks: AsyncIterator[bytes]) -> Response:
    """A response of server-sent events; `chunks` are whole events. It is closed when the client goes."""
    return StreamingResponse(chunks, media_type="text/event-stream", headers={"cache-control": "no-store"})


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
    """`error` in the dialect that `path` (the raw ASGI path) speaks."""
    if path.startswith("/v1/messages"):
        kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        body: Any = {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
    else:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        body = {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
    response = json_response(body, error.status)
    if error.retry_after is not None:
        response.headers["retry-after"] = str(max(1, round(error.retry_after)))
    return response
