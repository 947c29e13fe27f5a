"""One line in the log for each request, at its end. Never a prompt, an answer, a key, a body or a query string."""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from indexshare.server.http import ApiError, error_response

CLIENT_LEFT = 499  # as nginx logs it; nobody is left to receive it

_request_logger = logging.getLogger("indexshare.requests")
_error_logger = logging.getLogger("indexshare.server")


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What is known of a request, filled in while it is answered. `route`: the template of its path, "" if unknown."""

    request_id: str
    method: str
    path: str
    started: float
    route: str = ""
    tenant: str = ""
    status: int = 0
    seconds: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0

    def fields(self) -> dict[str, Any]:
        """The log line: token counts only where a model was asked."""
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "seconds": round(self.seconds, 4),
            "tenant": self.tenant,
        }
        if self.num_prompt_tokens or self.num_completion_tokens:
            fields["prompt_tokens"] = self.num_prompt_tokens
            fields["cached_tokens"] = self.num_cached_tokens
            fields["completion_tokens"] = self.num_completion_tokens
        return fields


current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)
"""The request that the running task answers."""


class LogRequests:
    """ASGI middleware: the log line, and the answer to what nobody caught.

    An unexpected exception is logged with its traceback here and the client gets 500 with the request id, never the
    exception's text. on_start, on_end: see every record too (metrics.py).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        on_start: Callable[[RequestRecord], None] = lambda record: None,
        on_end: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        self.app = app
        self.on_start, self.on_end = on_start, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(
            request_id=scope["state"]["request_id"],
            method=scope["method"],
            path=scope["path"],
            started=time.perf_counter(),
        )
        complete = False

        async def watched(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        self.on_start(record)
        token = current_record.set(record)
        try:
            await self._answer(record, scope, receive, watched)
        finally:
            current_record.reset(token)
            if not complete:
                record.status = CLIENT_LEFT
            record.seconds = time.perf_counter() - record.started
            record.tenant = scope["state"].get("tenant", "")
            record.route = getattr(scope.get("route"), "path", "")
            self.on_end(record)
            _request_logger.info("request", extra={"fields": record.fields()})

    async def _answer(self, record: RequestRecord, scope: Scope, receive: Receive, send: Send) -> None:
        error: ApiError
        try:
            await self.app(scope, receive, send)
            return
        except ClientDisconnect:
            return
        except asyncio.CancelledError:  # by the server, at the end of its grace; there is nothing above to tell
            error = ApiError(503, "the server is shutting down; try again later", retry_after=5)
        except Exception:
            _error_logger.exception("unexpected error", extra={"fields": {"request_id": record.request_id}})
            error = ApiError(500, f"internal error (request id {record.request_id})")
        if not record.status:  # else the reply is broken off, which clients see as an error
            await error_response(scope["path"], error, record.request_id)(scope, receive, send)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, the `fields` given with it, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """A record for people. Values are quoted where they hold anything unusual, so that no request can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        message = " ".join([record.getMessage(), *(f"{name}={_quoted(value)}" for name, value in fields.items())])
        when = datetime.fromtimestamp(record.created).isoformat(" ", "seconds")
        line = f"{when} {record.levelname.lower()}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _quoted(value: object) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() and text and not set(text) & set(' "=\\') else json.dumps(text)


def configure_logging(
    kind: Literal["text", "json"] = "text", *, level: int | str = logging.INFO, stream: TextIO | None = None
) -> None:
    """Send the logs of indexshare to `stream` (standard error), and those of others from WARNING on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("indexshare").setLevel(level)  # uvicorn tells of its own steps only what went wrong
