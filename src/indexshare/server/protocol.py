"""The sockets: HTTP heads of bounded size that come in time, readers that read, and a server that ends in order."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from indexshare.errors import ConfigError
from indexshare.server.app import ServerSettings

LINGER_SECONDS = 2.0
LAST_WORDS_SECONDS = 2  # for replies that are told to end when the drain time is over
CANCEL_SECONDS = 5.0

_logger = logging.getLogger("indexshare.server")


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the limits it has no settings for.

    - A head above max_head_bytes gets 431; one that is not complete after head_seconds ends the connection.
    - What surrounds a body (chunk headers, trailers) counts too, less an eighth of the body. Trailers are ignored:
      uvicorn would add them to the headers after these were checked.
    - Above max_connections a new connection gets 503.
    - A client that leaves its reply unread for write_seconds is cut off, which cancels the handler.
    - One that is answered before its body was read may not go on sending: the connection ends.
    """

    settings: ServerSettings  # of the subclass that make_server makes: uvicorn calls the class itself

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_head = True
        self.receiving = False  # from the first byte of a message to its last
        self.lingering = False
        self.head_bytes = 0  # of the url and header fields
        self.spare_bytes = 0.0  # how many bytes that are no body may still come with this message
        self.head_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.spare_bytes = self.settings.max_head_bytes
        if len(self.connections) > self.settings.max_connections:
            self._refuse(503, "Service Unavailable")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.head_timer, self.write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.lingering or self.transport.is_closing():
            return
        if self.in_head and self.head_timer is None:
            self._await_head()
        self.spare_bytes -= len(data)
        super().data_received(data)
        if self.spare_bytes < 0 and not self.transport.is_closing() and not self.lingering:
            self._refuse(431, "Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.receiving, self.head_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        self.head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:
            self.head_bytes += len(name) + len(value) + 4
            if self.head_bytes <= self.settings.max_head_bytes:
                super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.in_head = False
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None
        if self.head_bytes > self.settings.max_head_bytes:
            self._refuse(431, "Request Header Fields Too Large")
        elif not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.spare_bytes += len(body) * 1.125
        if self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self.in_head, self.receiving = True, False
        # The next head may have come in the same read, and then its bytes were taken off already.
        self.spare_bytes = self.settings.max_head_bytes
        if self.cycle is not None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.receiving and not self.transport.is_closing():
            self._linger()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_timer = self.loop.call_later(self.settings.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.write_timer is not None:
            self.write_timer.cancel()

    def _await_head(self) -> None:
        self.head_timer = self.loop.call_later(self.settings.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self.head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # it is for after the reply that still runs
        else:
            self.transport.close()

    def _refuse(self, status: int, phrase: str) -> None:
        """Answer without asking the application, and end the connection."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(
                f"HTTP/1.1 {status} {phrase}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()
            )
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """End the connection such that the client can still read its answer: bytes unread would make that a reset."""
        self.lingering = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


class Server(uvicorn.Server):
    """uvicorn's server; the first SIGINT or SIGTERM drains it, the second ends it at once.

    Neither is raised again afterwards, as uvicorn does: the caller has an engine to close. Draining: no new
    connections, running replies may end in `drain_seconds`, then they are cancelled.
    """

    on_exit: Callable[[], Awaitable[None]] | None = None
    """Called when draining begins; it may end replies in their own words before the time is over."""
    exiting: asyncio.Future[None] | None = None  # held, so that it is not collected

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.should_exit:
            self.force_exit = True
            for connection in list(self.server_state.connections):
                connection.loop.call_soon_threadsafe(connection.transport.abort)
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        """Drain, then give what was cancelled a moment to clean up."""
        if self.on_exit is not None:
            self.exiting = asyncio.ensure_future(self.on_exit())
        await super().shutdown(sockets)
        if tasks := set(self.server_state.tasks):
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        if self.force_exit:  # uvicorn leaves it out, but an engine must be told
            with suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), CANCEL_SECONDS)


def make_server(app: ASGIApp, settings: ServerSettings) -> Server:
    """A server for `app`; `run()` blocks until a signal, `serve()` is the coroutine."""
    protocol = type("ConfiguredProtocol", (GuardedProtocol,), {"settings": settings})
    return Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=protocol,
            ws="none",
            lifespan="auto",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody could write X-Forwarded-For
            timeout_keep_alive=settings.idle_seconds,
            timeout_graceful_shutdown=settings.drain_seconds + LAST_WORDS_SECONDS,
        )
    )


def listen(settings: ServerSettings) -> socket.socket:
    """A socket for `Server.serve(sockets=[...])`, on port 0 any free one. Raises ConfigError when that is not possible.

    uvicorn would end the process instead when the port is in use.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=settings.max_connections)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {settings.host}:{settings.port} ({reason}); try another --port") from error
    # Inherited by every connection. asyncio sets it only on sockets that name their protocol; without it an answer in
    # two parts waits 40 ms for the client's acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    host, port = listener.getsockname()[:2]
    _logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    return listener
