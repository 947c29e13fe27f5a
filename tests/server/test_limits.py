"""Bodies are counted as they come, their total is bounded, and a handler stops when its client goes."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from indexshare.server.http import ApiError
from indexshare.server.limits import BodyLimits, LimitRequests

GONE: Message = {"type": "http.disconnect"}


def part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def scope_of(headers: dict[str, str]) -> Scope:
    return {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }


def receiver(messages: Sequence[Message]) -> Receive:
    """Gives the messages, then waits for ever."""
    left = list(messages)

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return receive


async def no_send(message: Message) -> None:
    raise AssertionError("nothing is sent here")


def read_body(messages: Sequence[Message], headers: dict[str, str] | None = None, **limits: Any) -> bytes:
    """What a handler that reads its body gets."""
    bodies: list[bytes] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await Request(scope, receive).body())

    app = LimitRequests(handler, BodyLimits(**limits))
    asyncio.run(app(scope_of(headers or {}), receiver(messages), no_send))
    assert app.total_bytes == 0
    return bodies[0]


def refused(*arguments: Any, **limits: Any) -> int:
    with pytest.raises(ApiError) as caught:
        read_body(*arguments, **limits)
    return caught.value.status


def test_a_body_in_parts_is_put_together() -> None:
    assert read_body([part(b"ab"), part(b""), part(b"cd", more=False)], max_body_bytes=4) == b"abcd"


def test_a_body_over_the_cap_is_refused_when_that_is_known() -> None:
    assert refused([part(b"ab"), part(b"cde")], max_body_bytes=4) == 413  # though more would come
    assert refused([], {"content-length": "5"}, max_body_bytes=4) == 413  # and nothing is waited for


@pytest.mark.parametrize("declared", ["-1", "+5", "1e3", "", "0x10", "9" * 5000])
def test_a_strange_content_length_is_refused(declared: str) -> None:
    assert refused([part(b"", more=False)], {"content-length": declared}) == 400


def test_a_body_that_does_not_come_in_time_is_refused() -> None:
    assert refused([part(b"ab")], body_seconds=0.02) == 408


def test_bytes_that_come_extend_the_time() -> None:
    """64 KiB are worth a second: a large body over a slow line is no attack."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await receive()

    asked = 0

    async def receive() -> Message:
        nonlocal asked
        asked += 1
        if asked > 1:
            await asyncio.sleep(0.1)
        return part(bytes(64 * 1024), more=asked < 2)

    asyncio.run(LimitRequests(handler, BodyLimits(body_seconds=0.05))(scope_of({}), receive, no_send))


def test_all_bodies_together_are_bounded_and_released() -> None:
    async def run() -> list[int]:
        release = asyncio.Event()
        statuses = []

        async def handler(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await receive()
                await release.wait()
                statuses.append(200)
            except ApiError as error:
                statuses.append(error.status)
                release.set()

        app = LimitRequests(handler, BodyLimits(max_total_bytes=10))
        messages = [part(b"123456", more=False)]
        await asyncio.gather(*(app(scope_of({}), receiver(messages), no_send) for _ in range(2)))
        await app(scope_of({}), receiver(messages), no_send)
        assert app.total_bytes == 0
        return statuses

    assert sorted(asyncio.run(run())) == [200, 200, 503]


def run_until_gone(work: Callable[[Receive], Any]) -> None:
    """Run a handler whose client leaves as soon as the body is complete."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await work(receive)

    app = LimitRequests(handler, BodyLimits())
    asyncio.run(app(scope_of({}), receiver([part(b"{}", more=False), GONE]), no_send))


def test_a_silent_handler_is_cancelled_when_its_client_goes_and_may_clean_up() -> None:
    seen = []

    async def work(receive: Receive) -> None:
        await receive()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # would raise again under a cancel scope
            seen.append("cleaned up")

    run_until_gone(work)
    assert seen == ["cleaned up"]


def test_a_handler_that_listens_itself_is_cancelled_too() -> None:
    seen = []

    async def work(receive: Receive) -> None:
        await receive()
        try:
            await receive()
        finally:
            seen.append("cancelled")

    run_until_gone(work)
    assert seen == ["cancelled"]


def test_a_client_that_goes_before_its_body_came() -> None:
    with pytest.raises(ClientDisconnect):
        read_body([part(b"ab"), GONE])


def test_a_cancellation_from_outside_is_passed_on() -> None:
    async def run() -> None:
        begun = asyncio.Event()

        async def handler(scope: Scope, receive: Receive, send: Send) -> None:
            begun.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(LimitRequests(handler, BodyLimits())(scope_of({}), receiver([]), no_send))
        await begun.wait()
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())


def test_so_is_one_while_the_handler_of_a_client_that_left_cleans_up() -> None:
    async def run() -> None:
        cleaning = asyncio.Event()

        async def handler(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await receive()
                await asyncio.Event().wait()
            finally:
                cleaning.set()
                await asyncio.Event().wait()

        messages = [part(b"", more=False), GONE]
        task = asyncio.ensure_future(LimitRequests(handler, BodyLimits())(scope_of({}), receiver(messages), no_send))
        await cleaning.wait()
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())


def test_an_error_of_the_handler_is_passed_on() -> None:
    async def work(receive: Receive) -> None:
        raise LookupError("x")

    with pytest.raises(LookupError):
        run_until_gone(work)
