"""A real server on a free port of this machine, in a thread, and raw sockets to talk to it."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from server.scripted import ScriptedService
from starlette.routing import BaseRoute

from indexshare.server.app import ServerSettings, create_app
from indexshare.server.protocol import Server, listen, make_server


class Live:
    """A running server: its port, and connections to it that give up after ten seconds."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(sent)
        return connection

    def ask(self, sent: bytes) -> bytes:
        """Everything the server says until it closes the connection."""
        with self.connect(sent) as connection:
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Until the end, also when that is a reset."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        data = connection.recv(65536)
        assert data, f"the server closed the connection after {received!r}"
        received += data
    return received


def head(target: str = "/health", method: str = "GET", host: str = "127.0.0.1", **headers: str) -> bytes:
    """A request's head; `content_length` is written content-length. The connection is closed after the answer."""
    fields = {"host": host, "connection": "close"} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")


@contextmanager
def live_server(
    routes: Sequence[BaseRoute] = (), service: ScriptedService | None = None, **settings: Any
) -> Iterator[Live]:
    chosen = ServerSettings(port=0, **settings)
    app = create_app(service or ScriptedService(lambda request: []), chosen, extra_routes=routes)
    server = make_server(app, chosen)
    with listen(chosen) as listener:  # connections wait in it until the thread is there
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Live(server, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(timeout=20)
    assert not thread.is_alive(), "the server did not end"
