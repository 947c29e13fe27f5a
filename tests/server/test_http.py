"""JSON that is read strictly and cheaply, events that keep a line open, and errors in two dialects."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message

from indexshare.errors import (
    IndexShareError,
    KernelError,
    MemoryLimitError,
    OverloadedError,
    RequestError,
    TemplateError,
)
from indexshare.server import http
from indexshare.server.http import ApiError, as_api_error, check_json_size, error_response, event_stream, read_json


class Body(msgspec.Struct, forbid_unknown_fields=True):
    number: int | None = None
    ratio: float | None = None
    text: str = ""
    anything: Any = None


def request_with(body: bytes, **headers: str) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    fields = {"content_type": "application/json"} | headers
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def read(body: bytes, **headers: str) -> Body:
    return asyncio.run(read_json(request_with(body, **headers), Body))


def refusal(body: bytes, **headers: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(body, **headers)
    assert len(json.loads(error_response("/", caught.value, "id").body)["error"]["message"]) <= 300
    return caught.value


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON", 'application/json; charset="UTF-8"', "application/json;"]
)
def test_json_is_read(content_type: str) -> None:
    assert read(b'{"number": 3, "text": "\xc3\xa9"}', content_type=content_type) == Body(number=3, text="é")


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", "application/jsonx"],
)
def test_other_content_types_are_refused(content_type: str) -> None:
    """text/plain and forms are what a strange web page may send without being asked."""
    assert refusal(b"{}", content_type=content_type).status == 415


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
def test_compressed_bodies_are_refused(encoding: str) -> None:
    assert refusal(b"\x1f\x8b", content_encoding=encoding).status == 415


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b"null", None),
        (b"{", None),
        (b'{"number": NaN}', None),
        (b'{"ratio": Infinity}', None),
        (b'{"ratio": 1e999}', "ratio"),
        (b'{"number": 1e400}', "number"),
        (b'{"number": true}', "number"),
        (b'{"number": "1"}', "number"),
        (b'{"number": 1.5}', "number"),
        (b'{"numbre": 1}', "numbre"),
        (b'{"text": "\\ud800"}', None),
        (b'{"text": "\xed\xa0\x80"}', None),
        (b'{"text": "\xff"}', None),
        (b'{"text": "\x00"}', None),
        (b'\xef\xbb\xbf{"text": ""}', None),
        ('{"text": ""}'.encode("utf-16"), None),
        (b'{"number": 1} {"number": 2}', None),
        (b'{"number": ' + b"9" * 5000 + b"}", "number"),
        (b'{"anything": ' + b"9" * 5000 + b"}", "anything"),
        (b'{"' + b"x" * 100_000 + b'": 1}', None),
    ],
)
def test_wrong_json_is_400_and_names_the_field(body: bytes, param: str | None) -> None:
    error = refusal(body)
    assert (error.status, error.param) == (400, param)


def test_of_a_key_that_is_there_twice_the_last_counts() -> None:
    assert read(b'{"number": 1, "number": 2}').number == 2


@pytest.mark.parametrize("opening", [b"[", b'{"x":'])
def test_depth_is_bounded(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    deep = opening * 63 + b"1" + closing * 63
    assert read(b'{"anything": ' + deep + b"}").anything
    assert "64 levels" in refusal(b'{"anything": ' + opening + deep + closing + b"}").message
    assert refusal(b'{"anything": ' + opening * 100_000).status == 400


@pytest.mark.parametrize("body", [b"[" * 100, b"]" * 100 + b"[" * 65, b'["' + b"[" * 65])
def test_depth_of_what_is_no_json(body: bytes) -> None:
    assert refusal(body).status == 400


def test_brackets_in_strings_do_not_count() -> None:
    text = "[{" * 1000 + '"\\' * 1000
    assert read(json.dumps({"text": text}).encode()).text == text


@given(
    st.recursive(
        st.none() | st.text('ab"\\[]{},', max_size=6), lambda v: st.lists(v) | st.dictionaries(st.text('"['), v)
    )
)
def test_depth_is_measured_as_it_is(value: object) -> None:
    def depth(value: object) -> int:
        if not isinstance(value, list | dict):
            return 0
        return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)

    body = json.dumps(value).encode()
    limit, http.MAX_JSON_DEPTH = http.MAX_JSON_DEPTH, 2
    try:
        if depth(value) > 2:
            with pytest.raises(ApiError):
                check_json_size(body)
        else:
            check_json_size(body)
    finally:
        http.MAX_JSON_DEPTH = limit


@pytest.mark.parametrize(
    "body",
    [b'{"anything": [' + b"[]," * 2_100_000, b"[" + b'"",' * 2_100_000, b"[" + b"0," * 2_100_000],
    ids=["lists", "strings", "numbers"],
)
def test_bodies_that_would_grow_are_refused(body: bytes) -> None:
    assert "values" in refusal(body).message


@pytest.mark.parametrize(
    "body",
    [b'"' + b'\\"' * 5_000_000, b'["' + b"x" * 10_000_000 + b'"]', b'"' * 1_000_001, b"\\" * 1_000_000 + b'"' * 1001],
    ids=["an endless string", "a long string", "quotes", "backslashes"],
)
def test_measuring_is_linear(body: bytes) -> None:
    begun = time.process_time()
    check_json_size(body)
    assert time.process_time() - begun < 3  # quadratic would be hours


class Chunks:
    """Yields `chunks`, silent before each of them until `go` is set, and says when it was closed."""

    def __init__(self, *chunks: bytes, error: Exception | None = None) -> None:
        self.chunks, self.error = chunks, error
        self.go = asyncio.Event()
        self.closed = asyncio.Event()

    async def __call__(self) -> AsyncIterator[bytes]:
        try:
            for chunk in self.chunks:
                await self.go.wait()
                yield chunk
            if self.error is not None:
                raise self.error
        finally:
            await asyncio.sleep(0)
            self.closed.set()


async def stream(
    chunks: Chunks, sent: list[Message], gone: asyncio.Event | None = None, arrived: asyncio.Event | None = None
) -> None:
    never = asyncio.Event()

    async def receive() -> Message:
        await (gone or never).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if arrived is not None and message.get("body", b"").startswith(b":"):
            arrived.set()

    response = event_stream(chunks(), keep_alive_seconds=0.01)
    await response({"type": "http", "method": "GET", "path": "/"}, receive, send)


def test_events_are_sent_as_they_are() -> None:
    async def run() -> list[Message]:
        chunks, sent = Chunks(b"data: 1\n\n", b"data: 2\n\n"), []
        chunks.go.set()
        await stream(chunks, sent)
        assert chunks.closed.is_set()
        return sent

    start, *bodies = asyncio.run(run())
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-store"
    assert [body["body"] for body in bodies] == [b"data: 1\n\n", b"data: 2\n\n", b""]
    assert [body.get("more_body") for body in bodies] == [True, True, False]


def test_silence_is_filled_with_comments_and_only_silence() -> None:
    async def run() -> list[bytes]:
        chunks, sent, arrived = Chunks(b"data: 1\n\n"), [], asyncio.Event()
        task = asyncio.ensure_future(stream(chunks, sent, arrived=arrived))
        await arrived.wait()
        chunks.go.set()
        await task
        return [message["body"] for message in sent[1:]]

    *comments, event, end = asyncio.run(run())
    assert comments and set(comments) == {b": keep-alive\n\n"}
    assert (event, end) == (b"data: 1\n\n", b"")


def test_when_the_client_goes_the_chunks_are_closed_and_that_awaited() -> None:
    async def run() -> None:
        chunks, gone, sent = Chunks(b"data: 1\n\n"), asyncio.Event(), []
        task = asyncio.ensure_future(stream(chunks, sent, gone))
        await asyncio.sleep(0)
        gone.set()
        await task
        assert chunks.closed.is_set()
        assert sent[-1].get("more_body", True)  # never ended as if it were whole

    asyncio.run(run())


def test_also_when_it_goes_while_a_chunk_is_being_sent() -> None:
    """Then the chunks wait at their `yield`, where no cancellation reaches them."""

    async def run() -> None:
        chunks, gone, never = Chunks(b"data: 1\n\n"), asyncio.Event(), asyncio.Event()
        chunks.go.set()

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                gone.set()
                await never.wait()

        await event_stream(chunks())({"type": "http"}, receive, send)
        assert chunks.closed.is_set()

    asyncio.run(run())


def test_a_failure_closes_the_chunks_and_does_not_end_the_reply() -> None:
    async def run() -> None:
        chunks, sent = Chunks(b"data: 1\n\n", error=LookupError("x")), []
        chunks.go.set()
        with pytest.raises(LookupError):
            await stream(chunks, sent)
        assert chunks.closed.is_set()
        assert sent[-1]["more_body"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("full", retry_after=2.5), 429, "overloaded"),
        (MemoryLimitError("large"), 400, "context_length_exceeded"),
        (RequestError("wrong"), 400, None),
        (TemplateError("template"), 400, None),
        (KernelError("secret detail"), 500, None),
    ],
)
def test_what_the_service_raises_has_a_status(error: IndexShareError, status: int, code: str | None) -> None:
    answer = as_api_error(error)
    assert (answer.status, answer.code) == (status, code)
    assert ("secret" in answer.message) is False


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503])
def test_errors_speak_the_dialect_of_the_path(status: int) -> None:
    error = ApiError(status, "m", param="p", code="c", retry_after=2.4)
    openai = error_response("/v1/chat/completions", error, "id")
    assert json.loads(openai.body)["error"] | {"type": ""} == {"message": "m", "type": "", "param": "p", "code": "c"}
    anthropic = error_response("/v1/messages/count_tokens", error, "id")
    body = json.loads(anthropic.body)
    assert (body["type"], body["error"]["message"], body["request_id"]) == ("error", "m", "id")
    for response in (openai, anthropic):
        assert response.status_code == status
        assert response.headers["retry-after"] == "2"
        assert ("www-authenticate" in response.headers) == (status == 401)


def test_messages_are_cut_in_the_middle() -> None:
    message = json.loads(error_response("/", ApiError(400, "wrong: " + "x" * 9999 + "; do this"), "id").body)["error"][
        "message"
    ]
    assert len(message) <= 300
    assert message.startswith("wrong: ") and message.endswith("; do this")


def test_a_lone_surrogate_in_a_message_is_sent() -> None:
    assert error_response("/", ApiError(400, "\ud800"), "id").status_code == 400
