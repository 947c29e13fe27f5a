"""One line for each request, that holds what it should and nothing it should not."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from server.scripted import ScriptedService
from server.sockets import head, live_server, read_until
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.chat.types import Done, Start, Text, Usage
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.http import event_stream
from indexshare.server.logs import JsonFormatter, TextFormatter, configure_logging
from indexshare.server.types import Piece

KEY = "key-" + "k" * 32
SECRET = "a secret that a prompt holds"

USAGE = Usage(num_prompt_tokens=7, num_completion_tokens=2, num_cached_tokens=3)
SCRIPT = [Piece(events=(Start(7), Text(SECRET[::-1]))), Piece(events=(Done("stop", USAGE),))]


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("json", stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def ask(*arguments: Any, routes: tuple[Route, ...] = (), **keywords: Any) -> httpx2.Response:
    app = create_app(
        ScriptedService(lambda request: SCRIPT), ServerSettings(api_keys={KEY: "alice"}), extra_routes=routes
    )

    async def send() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
            return await client.request(*arguments, headers={"x-api-key": KEY, "x-request-id": "r1"}, **keywords)

    return asyncio.run(send())


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_reply_is_one_line_with_its_counts_and_no_content(log: io.StringIO, is_streamed: bool) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": SECRET}], "stream": is_streamed}
    assert ask("POST", "/v1/chat/completions?secret=query", json=body).status_code == 200
    (line,) = lines(log)
    assert line.pop("time").endswith("+00:00")
    assert 0 <= line.pop("seconds") < 60
    assert line == {
        "level": "info",
        "logger": "indexshare.requests",
        "message": "request",
        "request_id": "r1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "tenant": "alice",
        "prompt_tokens": 7,
        "cached_tokens": 3,
        "completion_tokens": 2,
    }
    for secret in (SECRET, SECRET[::-1], KEY, "query"):
        assert secret not in log.getvalue()


def test_an_unexpected_error_is_logged_and_not_told(log: io.StringIO) -> None:
    async def broken(request: Request) -> Response:
        raise LookupError("internal detail")

    answer = ask("GET", "/broken", routes=(Route("/broken", broken),))
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error (request id r1)"
    assert "internal detail" not in answer.text
    error, line = lines(log)
    assert (error["level"], error["request_id"]) == ("error", "r1")
    assert "LookupError: internal detail" in error["traceback"]
    assert (line["status"], line["path"]) == (500, "/broken")


def test_an_error_after_the_start_breaks_the_reply_off(log: io.StringIO) -> None:
    async def chunks() -> Any:
        yield b"data: 1\n\n"
        raise LookupError("internal detail")

    async def broken(request: Request) -> Response:
        return event_stream(chunks())

    with live_server([Route("/broken", broken)]) as live:
        answer = live.ask(head("/broken"))
    assert b"data: 1" in answer
    assert not answer.endswith(b"0\r\n\r\n")
    assert b"detail" not in answer
    assert "LookupError: internal detail" in log.getvalue()


def test_a_client_that_leaves_is_499(log: io.StringIO) -> None:
    async def chunks() -> Any:
        yield b"data: 1\n\n"
        await asyncio.Event().wait()

    async def silent(request: Request) -> Response:
        return event_stream(chunks())

    with live_server([Route("/silent", silent)]) as live, live.connect(head("/silent")) as connection:
        read_until(connection, b"data: 1")
    (line,) = [line for line in lines(log) if line["logger"] == "indexshare.requests"]
    assert line["status"] == 499


def test_a_refused_request_is_logged_too(log: io.StringIO) -> None:
    ask("GET", "/nowhere%0A2026-01-01%20forged")
    (line,) = lines(log)
    assert line["status"] == 404
    assert "\\n" in log.getvalue()


def test_text_lines_cannot_be_forged() -> None:
    fields = {"path": "/x\n2026-01-01 info: forged", "tenant": "", "status": 200, "name": "a b=c"}
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "fields": fields})
    line = TextFormatter().format(record)
    assert "\n" not in line
    assert line.endswith(' info: request path="/x\\n2026-01-01 info: forged" tenant="" status=200 name="a b=c"')


def test_records_of_others_are_formatted_too() -> None:
    record = logging.makeLogRecord({"msg": "%s is %d", "args": ("x", 3), "levelname": "WARNING", "name": "other"})
    assert json.loads(JsonFormatter().format(record)) | {"time": ""} == {
        "time": "",
        "level": "warning",
        "logger": "other",
        "message": "x is 3",
    }
    assert TextFormatter().format(record).endswith("warning: x is 3")
