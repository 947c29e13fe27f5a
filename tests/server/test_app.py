"""The whole application: what exists, what does not, and what the service raises."""

import asyncio
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.scripted import ScriptedService
from starlette.applications import Starlette

from indexshare.chat.types import Done, Start, Text, Usage
from indexshare.errors import ConfigError, KernelError, MemoryLimitError, OverloadedError, RequestError
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.limits import BodyLimits
from indexshare.server.types import Piece

SCRIPT = [
    Piece(events=(Start(7), Text("hello"))),
    Piece(events=(Done("stop", Usage(num_prompt_tokens=7, num_completion_tokens=1)),)),
]
CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "x"}]}


def ask(app: Starlette, method: str, path: str, **rest: Any) -> httpx2.Response:
    async def send() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **rest)

    return asyncio.run(send())


def app_with(error: Exception | None = None, **options: Any) -> Starlette:
    def script(request: object) -> list[Piece]:
        if error is not None:
            raise error
        return SCRIPT

    return create_app(ScriptedService(script), ServerSettings(**options.pop("settings", {})), **options)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "scripted", "prompt": "x"}),
        ("/v1/responses", {"model": "scripted", "input": "x"}),
        ("/v1/messages", CHAT | {"max_tokens": 5}),
    ],
)
def test_every_dialect_is_there(path: str, body: dict[str, Any]) -> None:
    answer = ask(app_with(), "POST", path, json=body)
    assert answer.status_code == 200
    assert "hello" in answer.text


def test_health_tells_nothing_else() -> None:
    assert ask(app_with(readiness=lambda: "loading"), "GET", "/health").json() == {"status": "ok"}


def test_ready_says_why_not() -> None:
    reasons: list[str | None] = ["the model is loading", None]
    app = app_with(readiness=lambda: reasons.pop(0))
    answer = ask(app, "GET", "/ready")
    assert (answer.status_code, answer.json()) == (503, {"ready": False, "reason": "the model is loading"})
    answer = ask(app, "GET", "/ready")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "reason": ""})


def test_metrics_are_prometheus_text() -> None:
    answer = ask(app_with(), "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert list(text_string_to_metric_families(answer.text))


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1", "/v1/chat/completions/", "/health/", "/docs", "/v1/messages/nowhere"]
)
def test_unknown_paths_are_404_in_the_dialect_and_never_redirected(path: str) -> None:
    answer = ask(app_with(), "GET", path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].startswith("there is no such path")
    assert ("request_id" in answer.json()) == path.startswith("/v1/messages")


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/chat/completions"), ("DELETE", "/v1/models"), ("PUT", "/")])
def test_unknown_methods_are_405(method: str, path: str) -> None:
    answer = ask(app_with(), method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"]
    assert "method" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("wrong"), 400),
        (MemoryLimitError("too large"), 400),
        (OverloadedError("full", retry_after=3), 429),
        (KernelError("a detail of this machine"), 500),
        (ZeroDivisionError("a detail of this machine"), 500),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_what_the_service_raises_becomes_an_answer(error: Exception, status: int, path: str) -> None:
    answer = ask(app_with(error), "POST", path, json=CHAT | {"max_tokens": 5})
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status == 429)
    assert "detail" not in answer.text
    assert ("request id" in answer.text) == (status == 500)


def test_limits_reach_the_dialects() -> None:
    app = app_with(settings={"body": BodyLimits(max_body_bytes=1000)})
    assert ask(app, "POST", "/v1/chat/completions", json=CHAT | {"user": "x" * 1000}).status_code == 413
    assert ask(app, "POST", "/v1/messages", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415


def test_an_early_refusal_does_not_read_the_body() -> None:
    read = []

    async def body() -> Any:
        read.append(1)
        yield b"{}"

    async def run() -> int:
        messages = []

        async def receive() -> Any:
            read.append(1)
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Any) -> None:
            messages.append(message)

        app = app_with(settings={"api_keys": {"k" * 20: "alice"}})
        headers = [(b"host", b"localhost"), (b"content-length", b"1000000")]
        scope = {"type": "http", "method": "POST", "path": "/v1/messages", "headers": headers, "scheme": "http"}
        await app(scope | {"query_string": b"", "root_path": ""}, receive, send)
        return messages[0]["status"]

    assert asyncio.run(run()) == 401
    assert not read


def test_websockets_are_closed_before_anything_else() -> None:
    async def run() -> list[Any]:
        messages = []

        async def send(message: Any) -> None:
            messages.append(message)

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        await app_with()({"type": "websocket", "path": "/metrics", "headers": []}, receive, send)
        return messages

    assert asyncio.run(run()) == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("port", [-1, 65_536, 99_999])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="--port must be from 0"):
        ServerSettings(port=port)
