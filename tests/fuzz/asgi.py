"""A request to the whole application without a socket, fast enough to send thousands."""

import asyncio
from collections.abc import Sequence

from starlette.types import ASGIApp, Message

Headers = Sequence[tuple[bytes, bytes]]
LOCAL: Headers = ((b"host", b"127.0.0.1"),)


def post(
    loop: asyncio.AbstractEventLoop, app: ASGIApp, path: str, body: bytes, headers: Headers = LOCAL
) -> tuple[int, bytes]:
    """The status and the body of the answer."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
        "headers": [(b"content-type", b"application/json"), *headers],
    }
    loop.run_until_complete(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)
