"""The sockets of a real server against what clients should not do; SECURITY.md lists it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from server.sockets import Live, head, live_server, read_all, read_until
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.errors import ConfigError
from indexshare.server.app import ServerSettings
from indexshare.server.http import event_stream, json_response
from indexshare.server.limits import BodyLimits
from indexshare.server.protocol import listen


class Streams:
    """Routes whose events the tests wait for."""

    def __init__(self) -> None:
        self.closed = threading.Semaphore(0)
        self.num_sent = 0

    async def silent(self) -> AsyncIterator[bytes]:
        import asyncio

        try:
            yield b"data: first\n\n"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # what cleans up may wait
            self.closed.release()

    async def endless(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: " + b"x" * 65536 + b"\n\n"
                self.num_sent += 1
        finally:
            self.closed.release()

    def routes(self) -> list[Route]:
        async def silent(request: Request) -> Response:
            await request.body()
            return event_stream(self.silent(), keep_alive_seconds=0.05)

        async def endless(request: Request) -> Response:
            return event_stream(self.endless())

        async def stuck(request: Request) -> Response:
            await request.body()
            async for _ in self.silent():
                pass
            return Response()

        async def size(request: Request) -> Response:
            return json_response({"bytes": len(await request.body())})

        return [
            Route("/silent", silent, methods=["POST"]),
            Route("/endless", endless),
            Route("/stuck", stuck, methods=["POST"]),
            Route("/size", size, methods=["POST"]),
        ]


@pytest.fixture(scope="module")
def streams() -> Streams:
    return Streams()


@pytest.fixture(scope="module")
def live(streams: Streams) -> Iterator[Live]:
    limits = BodyLimits(max_body_bytes=1_000_000, body_seconds=0.3)
    with live_server(
        streams.routes(), head_seconds=0.3, write_seconds=0.3, idle_seconds=1, drain_seconds=1, body=limits
    ) as running:
        yield running


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_a_plain_request_is_answered_without_a_server_header(live: Live) -> None:
    answer = live.ask(head())
    assert status(answer) == 200
    assert answer.endswith(b'{"status":"ok"}')
    assert b"\r\nserver:" not in answer.lower()


def test_connections_are_kept_and_closed_when_idle(live: Live) -> None:
    request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with live.connect(request) as connection:
        for _ in range(3):
            read_until(connection, b'{"status":"ok"}')
            connection.sendall(request)
        assert read_all(connection).count(b"200 OK") == 1


@pytest.mark.parametrize("padding", ["one field", "many fields", "the url"])
def test_head_of_200_kb_gets_431(live: Live, padding: str) -> None:
    match padding:
        case "one field":
            sent = head(x_large="x" * 200_000)
        case "many fields":
            sent = head(**{f"x_{number}": "y" * 50 for number in range(3000)})
        case _:
            sent = head("/health?" + "x" * 200_000)
    assert status(live.ask(sent)) == 431


def test_head_that_never_ends_gets_431_while_it_comes(live: Live) -> None:
    with live.connect(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: ") as connection:
        connection.sendall(b"x" * 40_000)
        assert status(read_all(connection)) == 431


def test_second_head_in_the_same_read_is_bounded_too(live: Live) -> None:
    first = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    answer = live.ask(first + head(x_large="x" * 100_000))
    assert answer.count(b"HTTP/1.1") <= 1  # 431, or the end of the connection while the first one is answered


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET / HTTP/1.1\r\nhost: localhost\r\n", b"\r\n"])
def test_half_sent_heads_are_closed(live: Live, sent: bytes) -> None:
    begun = time.monotonic()
    connections = [live.connect(sent) for _ in range(20)]
    for connection in connections:
        with connection:
            assert read_all(connection) == b""
    assert time.monotonic() - begun < 5


def test_head_that_trickles_is_closed(live: Live) -> None:
    """Bytes that keep coming do not extend the time, not even empty lines between requests."""
    begun = time.monotonic()
    with live.connect(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n") as connection:
        read_until(connection, b'{"status":"ok"}')
        connection.settimeout(0.05)
        while time.monotonic() - begun < 5:
            try:
                connection.sendall(b"\r\n")
                if not connection.recv(100):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the connection is still open")


def test_content_length_with_chunked_is_refused(live: Live) -> None:
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n"
    answer = live.ask(head("/size", "POST", content_length="5", transfer_encoding="chunked") + smuggled)
    assert status(answer) == 400
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
        b"\x80\x04\x95" + bytes(64),  # what a pickle begins with
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\nhost: localhost\n\n\x00\xff",
        b"GET /\x00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"POST /size HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /size HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ],
)
def test_garbage_harms_nobody(live: Live, sent: bytes) -> None:
    answer = live.ask(sent)
    assert not answer or status(answer) < 500
    assert status(live.ask(head())) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1/x",
        "127.0.0.1?x",
        "127.0.0.1#x",
        "a@127.0.0.1",
        "127.0.0.1\\x",
        "127.0.0.1 x",
        "",
        "[",
    ],
)
def test_strange_hosts_are_refused(live: Live, host: str) -> None:
    assert status(live.ask(head("/v1/models", host=host))) == 400


def test_no_host_and_two_hosts_are_refused(live: Live) -> None:
    assert status(live.ask(b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n")) == 400
    assert status(live.ask(b"GET /health HTTP/1.0\r\n\r\n")) == 400
    two = b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    assert status(live.ask(two)) == 400


def test_declared_body_over_the_cap_is_refused_before_it_comes(live: Live) -> None:
    with live.connect(head("/size", "POST", content_length="300000000")) as connection:
        assert status(read_until(connection, b"\r\n\r\n")) == 413


def test_chunked_body_over_the_cap_is_refused_on_the_way_and_the_connection_ends(live: Live) -> None:
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    with live.connect(head("/size", "POST", transfer_encoding="chunked")) as connection:
        sender = threading.Thread(target=send_until_closed, args=(connection, chunk))
        sender.start()
        assert status(read_all(connection)) == 413
        connection.close()
        sender.join(timeout=10)
        assert not sender.is_alive()


def send_until_closed(connection: socket.socket, data: bytes) -> None:
    try:
        while True:
            connection.sendall(data)
    except OSError:
        return


def test_body_at_the_cap_is_read(live: Live) -> None:
    answer = live.ask(head("/size", "POST", content_length="1000000") + b"x" * 1_000_000)
    assert answer.endswith(b'{"bytes":1000000}')


def test_body_that_does_not_come_gets_408(live: Live) -> None:
    assert status(live.ask(head("/size", "POST", content_length="10") + b"12345")) == 408


def test_chunk_headers_and_trailers_are_bounded(live: Live) -> None:
    chunked = head("/size", "POST", transfer_encoding="chunked")
    assert b" 200 " not in live.ask(chunked + b"5;" + b"x" * 40_000)  # the connection ends
    trailers = b"5\r\nhello\r\n0\r\n" + b"".join(b"x-%d: y\r\n" % number for number in range(20_000))
    assert b" 200 " not in live.ask(chunked + trailers)


def test_trailers_do_not_become_headers(live: Live) -> None:
    body = b"5\r\nhello\r\n0\r\nhost: evil.example\r\norigin: http://evil.example\r\n\r\n"
    assert live.ask(head("/size", "POST", transfer_encoding="chunked") + body).endswith(b'{"bytes":5}')


def test_small_chunks_are_no_attack(live: Live) -> None:
    body = (b"40\r\n" + b"x" * 64 + b"\r\n") * 15_000 + b"0\r\n\r\n"
    assert live.ask(head("/size", "POST", transfer_encoding="chunked") + body).endswith(b'{"bytes":960000}')


def test_a_small_body_that_nobody_reads_does_not_end_the_connection(live: Live) -> None:
    """A key that is wrong is answered from the head alone; the body comes later, and then the next request."""
    request = head("/nowhere", "POST", connection="keep-alive", content_length="5")
    with live.connect() as connection:
        for _ in range(3):
            connection.sendall(request)
            time.sleep(0.05)  # the head must come alone
            connection.sendall(b"12345")
            read_until(connection, b"see /openapi.json")
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        read_until(connection, b'{"status":"ok"}')


def test_answered_before_the_body_was_read_the_connection_ends(live: Live) -> None:
    """Else a client without a key could send for ever after its 401, a byte now and then."""
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.05):
            try:
                connection.sendall(b"x")
            except OSError:
                return

    with live.connect(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n") as connection:
        sender = threading.Thread(target=trickle)
        sender.start()
        try:
            assert status(read_all(connection)) == 404
        finally:
            ended.set()
            sender.join()


@pytest.mark.parametrize("path", ["/silent", "/stuck"])
def test_client_that_leaves_in_silence_closes_the_iterator(live: Live, streams: Streams, path: str) -> None:
    with live.connect(head(path, "POST", content_length="0")) as connection:
        if path == "/silent":
            read_until(connection, b": keep-alive")
        else:
            live.ask(head())  # the handler has begun, or will find its client gone
    assert streams.closed.acquire(timeout=5)


def test_a_half_closed_socket_counts_as_gone(live: Live, streams: Streams) -> None:
    with live.connect(head("/silent", "POST", content_length="0")) as connection:
        read_until(connection, b"first")
        connection.shutdown(socket.SHUT_WR)
        assert streams.closed.acquire(timeout=5)


def test_a_hundred_clients_that_leave_leave_nothing_behind(live: Live, streams: Streams) -> None:
    connections = [live.connect(head("/silent", "POST", content_length="0")) for _ in range(100)]
    for connection in connections:
        read_until(connection, b"first")
        connection.close()
    for _ in connections:
        assert streams.closed.acquire(timeout=5)
    assert status(live.ask(head())) == 200
    deadline = time.monotonic() + 5
    while live.server.server_state.tasks and time.monotonic() < deadline:
        live.ask(head())
    assert not live.server.server_state.tasks


def test_reader_that_does_not_read_is_cut_off(live: Live, streams: Streams) -> None:
    with live.connect(head("/endless")) as connection:
        read_until(connection, b"data: ")
        assert streams.closed.acquire(timeout=10)
        assert streams.num_sent * 65536 < 64 * 2**20  # it was stopped by the sockets' buffers and not by memory


def test_too_many_connections_are_refused_and_places_come_back() -> None:
    with live_server(max_connections=3) as live:
        held = [live.connect() for _ in range(3)]
        read_until_open = head()
        assert status(live.ask(read_until_open)) == 503
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 5
        while (answer := status(live.ask(head()))) == 503 and time.monotonic() < deadline:
            pass
        assert answer == 200


def test_a_port_in_use_is_an_error_that_says_so(live: Live) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        listen(ServerSettings(port=live.port))


def test_replies_that_do_not_end_are_cancelled_after_the_grace() -> None:
    streams = Streams()
    with live_server(streams.routes(), drain_seconds=1) as live:
        silent = live.connect(head("/silent", "POST", content_length="0"))
        stuck = live.connect(head("/stuck", "POST", content_length="0"))
        read_until(silent, b"first")
        live.ask(head())
        live.server.should_exit = True
        assert not read_all(silent).endswith(b"0\r\n\r\n")  # broken off, so that nobody takes it for the whole
        assert status(read_all(stuck)) == 503
        assert streams.closed.acquire(timeout=5)
        assert streams.closed.acquire(timeout=5)
        silent.close()
        stuck.close()


def test_a_second_signal_ends_at_once() -> None:
    streams = Streams()
    with live_server(streams.routes(), drain_seconds=60) as live, live.connect() as connection:
        connection.sendall(head("/silent", "POST", content_length="0"))
        read_until(connection, b"first")
        live.server.handle_exit(signal.SIGTERM, None)
        live.server.handle_exit(signal.SIGTERM, None)
        assert not read_all(connection).endswith(b"0\r\n\r\n")
        assert streams.closed.acquire(timeout=5)


PROGRAM = """
import asyncio, sys
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.http import event_stream
from indexshare.server.logs import configure_logging
from indexshare.server.protocol import listen, make_server
from server.scripted import ScriptedService
from starlette.routing import Route

async def events():
    try:
        yield b"data: first\\n\\n"
        await asyncio.sleep(0.5)
        yield b"data: last\\n\\n"
    finally:
        sys.stderr.write("CLOSED\\n")

async def stream(request):
    return event_stream(events())

configure_logging("json")
settings = ServerSettings(port=0, drain_seconds=20)
app = create_app(ScriptedService(lambda request: []), settings, extra_routes=[Route("/stream", stream)])
with listen(settings) as listener:
    make_server(app, settings).run(sockets=[listener])
sys.stderr.write("AFTER\\n")
"""


def test_a_signal_lets_running_replies_end_and_the_caller_go_on() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        while "listening on" not in line:
            assert line, "the server did not start"
            line = process.stderr.readline()
        port = int(line.split("http://127.0.0.1:")[1].split('"')[0])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head("/stream"))
            read_until(connection, b"first")
            process.send_signal(signal.SIGTERM)
            rest = read_all(connection)
        errors = process.stderr.read()
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert b"last" in rest
    assert "CLOSED" in errors
    assert errors.rstrip().endswith("AFTER")
    assert "Traceback" not in errors


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with listen(ServerSettings(port=0)) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
