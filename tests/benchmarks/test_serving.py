"""The benchmark of the server: its clients on a server with a script, its processes, figures and report."""

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import serving_report
from serving import main
from serving_bench import Sizes, body
from serving_client import Answer, Load, LoadError, Plan, drive
from serving_llama import agreement, figures, request
from serving_model import FIRST_WORD, tokenizer_spec
from serving_parts import gaps_between, token_seconds
from serving_report import OTHERS, Run, latencies, percentile, ratios, short, write_json
from serving_servers import Server, ServerError, free_port, parse_metrics

from indexshare.chat.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}


def event(**content: object) -> bytes:
    data = b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n" % len(data) + data + b"\r\n"


def words(*texts: str) -> list[bytes]:
    return [event(choices=[{"text": text}]) for text in texts]


STREAM = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    *words(" one", "", " two"),
    event(choices=[], usage=USAGE),
    b"e\r\ndata: [DONE]\n\n\r\n",
    b"0\r\n\r\n",
)


@contextmanager
def scripted(pieces: tuple[bytes, ...], num_connections: int = 1, closes: bool = False) -> Generator[int]:
    """A server that answers every request with the same bytes, piece by piece; clients see them in any grouping."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client that was told to end leaves in the middle.
            with suppress(ConnectionError), connection, connection.makefile("rb") as received:
                while line := received.readline():
                    length = 0
                    while line.strip():
                        name, _, value = line.partition(b":")
                        length = int(value) if name.lower() == b"content-length" else length
                        line = received.readline()
                    received.read(length)
                    for piece in pieces:
                        connection.sendall(piece)
                    if closes:
                        return

        def accept() -> None:
            for _ in range(num_connections):
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

        threads = [threading.Thread(target=accept)]
        threads[0].start()
        yield listener.getsockname()[1]
        for thread in threads:
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_clients_note_when_text_comes_and_what_was_counted() -> None:
    with scripted(STREAM, num_connections=2) as port:
        load = drive(Plan(port=port, clients=[[body([1, 2, 3], 2)] * 3] * 2, keeps_text=True))
    assert load.num_tokens == 12 and load.seconds > 0 and load.cpu_seconds > 0
    assert sorted(answer.client for answer in load.answers) == [0, 0, 0, 1, 1, 1]
    for answer in load.answers:
        assert (answer.status, answer.num_prompt_tokens, answer.num_cached_tokens) == (200, 3, 1)
        assert answer.text == " one two"
        assert 1 <= len(answer.arrivals) <= 2, "empty text is no arrival"
        assert answer.begun <= answer.arrivals[0] <= answer.arrivals[-1] <= answer.ended
    assert len(load.first_seconds) == 6


def test_clients_may_have_a_connection_for_each_request() -> None:
    with scripted(STREAM, num_connections=3) as port:  # a third one is opened after the last request
        load = drive(Plan(port=port, clients=[[body([1], 2)] * 2], reconnects=True))
    assert load.num_tokens == 4


def test_an_intruder_ends_the_others() -> None:
    with scripted(STREAM, num_connections=3) as port:
        load = drive(Plan(port=port, clients=[[body([1], 2)]] * 2, intruder=body([2], 2), num_before=4))
    assert load.intruder is not None and load.intruder.num_tokens == 2
    counts = [sum(len(answer.arrivals) for answer in load.answers if answer.client == client) for client in (0, 1)]
    assert min(counts) >= 4


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ((b"HTTP/1.1 400 Bad\r\ncontent-length: 9\r\n\r\n", b"no prompt"), "status 400: no prompt"),
        (
            (STREAM[0], event(error={"message": "a step failed"}), b"0\r\n\r\n"),
            "the reply broke off: .*a step failed",
        ),
        ((STREAM[0], *words(" one")), "the server closed the connection"),
    ],
)
def test_clients_report_what_went_wrong(pieces: tuple[bytes, ...], message: str) -> None:
    with scripted(pieces, closes=True) as port, pytest.raises(LoadError, match=message):
        drive(Plan(port=port, clients=[[body([1], 2)]]))


def test_clients_do_not_wait_for_ever() -> None:
    with scripted((STREAM[0],)) as port, pytest.raises(LoadError, match="not answered within 0"):
        drive(Plan(port=port, clients=[[body([1], 2)]], limit_seconds=0.2))


def test_a_server_that_does_not_start_is_reported_with_its_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        Server("broken", command, free_port(), tmp_path / "log", ready_path="/ready") as server,
        pytest.raises(ServerError, match="broken did not get ready: no such model"),
    ):
        server.wait()


def test_a_server_is_paused_ended_and_not_left_behind(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with Server("files", command, port, tmp_path / "log", ready_path="/") as server:
        assert server.wait().get("/nothing")[0] == 404
        assert server.rss_bytes > 2**20 and server.cpu_seconds > 0
        server.pause()
        assert server.is_running
    assert not server.is_running, "a paused server ends too"
    child = f"""
import os, sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from serving_servers import Server
sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
server = Server("orphan", sleeper, 1, Path({str(tmp_path / "orphan.log")!r}), ready_path="/")
print(server._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=False)
    with suppress(ProcessLookupError):  # gone already
        orphan = os.pidfd_open(int(done.stdout))
        assert select.select([orphan], [], [], 10)[0], "the server has outlived its parent"
        os.close(orphan)


def test_metrics_are_read_with_their_labels() -> None:
    text = '# HELP a b\na_total 3.0\nb{route="/v1/x",status="200"} 1e-3\n'
    assert parse_metrics(text) == {"a_total": 3.0, 'b{route="/v1/x",status="200"}': 0.001}


def test_every_token_of_the_made_up_tokenizer_is_a_piece_of_text() -> None:
    tokenizer = Tokenizer.from_json(json.dumps(tokenizer_spec(2048)))
    assert tokenizer.vocab_size == 2048 and tokenizer.stop_ids == (2047,)
    texts = [tokenizer.decode([token_id]) for token_id in range(FIRST_WORD, 2047)]
    assert len(set(texts)) == len(texts) and all(text.startswith(" ") and text[1:].isalpha() for text in texts)
    assert tokenizer.encode("ab") == [256]
    assert {tokenizer.token_bytes(token_id) for token_id in range(256)} == {bytes([byte]) for byte in range(256)}


def test_percentiles_and_gaps() -> None:
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0 and percentile([], 95) != percentile([], 95)
    assert latencies([0.1, 0.3], [0.01])["TTFT p50 ms"] == pytest.approx(200)
    answer = Answer(client=0, begun=1.0, arrivals=[2.0, 2.5, 4.0], ended=4.5, num_tokens=5)
    assert answer.first_seconds == 1.0 and answer.gaps == [0.5, 1.5]
    assert Answer(client=0, begun=1.0, ended=3.0).first_seconds == 2.0
    assert gaps_between([answer], 0.0, 2.5) == [0.5] and gaps_between([answer], 2.5, 9.0) == [1.5]
    assert token_seconds(answer) == 0.5


def test_llama_gets_the_same_request_and_answers_are_compared_word_by_word() -> None:
    own, other = request("indexshare", [1, 2], 3), request("llama.cpp", [1, 2], 3)
    assert other == own | {"cache_prompt": False, "ignore_eos": True} and own["stream"]
    assert agreement([["a", "b"], ["c", "d"], []], [["a", "b"], ["c", "e"], []]) == pytest.approx((2 / 3, 2 / 3))
    answers = [Answer(client=0, begun=0.0, arrivals=[1.0, 2.0], ended=2.0, num_tokens=2, num_prompt_tokens=8)]
    found = figures(Load(seconds=2.0, cpu_seconds=0.0, answers=answers))
    assert (found["tokens/s"], found["read and drawn/s"], found["TTFT p50 ms"]) == (1.0, 5.0, 1000.0)


def run_with(cases: Mapping[tuple[str, str, int], Mapping[str, list[float]]]) -> Run:
    run = Run(model="tiny", machine={"processor": "P", "threads": "2"}, settings={})
    for (part, name, num_clients), repeats in cases.items():
        for values in zip(*repeats.values(), strict=True):
            run.add(part, name, num_clients, dict(zip(repeats, values, strict=True)))
    return run


def test_a_run_is_medians_ratios_a_file_a_table_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(
        {
            ("load", "different prompts", 1): {"tokens/s": [10.0, 30.0, 20.0], OTHERS: [9.0] * 3},
            ("load", "different prompts", 4): {"tokens/s": [40.0], "TTFT p50 ms": [5.0]},
            ("long", "9 tokens, cold", 1): {"TTFT p50 ms": [90.0]},
            ("long", "9 tokens, warm", 1): {"TTFT p50 ms": [9.0]},
            ("drafts", "code, 0 drafts", 1): {"tokens/s": [10.0]},
            ("drafts", "code, 3 drafts", 1): {"tokens/s": [15.0] * 3, "accepted 1 %": [float("nan"), 3.0, 5.0]},
            ("drafts", "code, 0 drafts, server", 1): {"tokens/s": [5.0]},
            ("drafts", "code, 3 drafts, server", 1): {"tokens/s": [10.0]},
            ("llama", "indexshare", 1): {"tokens/s": [6.0], "TTFT p50 ms": [1.0]},
            ("llama", "llama.cpp", 1): {"tokens/s": [2.0], "TTFT p50 ms": [4.0]},
        }
    )  # fmt: skip
    run.note("said once")
    run.note("said once")
    assert run.median("load", "different prompts", 1, "tokens/s") == 20.0
    assert run.median("load", "different prompts", 9, "tokens/s") is None
    assert dict(ratios(run)) == {
        "TTFT 9 tokens, cold / warm, 1 client": 10.0,
        "tokens/s code, 3 drafts / no drafts, 1 client": 1.5,
        "tokens/s code, 3 drafts, server / no drafts, 1 client": 2.0,
        "tokens/s indexshare / llama.cpp, 1 client": 3.0,
        "TTFT llama.cpp / indexshare, 1 client": 4.0,
    }
    write_json(run, tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["cases"][0]["medians"]["tokens/s"] == 20.0 and content["notes"] == ["said once"]
    assert content["cases"][5]["repeats"]["accepted 1 %"] == [None, 3.0, 5.0]
    assert content["cases"][5]["medians"]["accepted 1 %"] == 4.0
    from rich.console import Console

    serving_report.print_tables(run, Console(width=200))
    shown = capsys.readouterr().out
    assert "~different prompts" in shown and "said once" in shown and "3.00x" in shown
    pytest.importorskip("matplotlib")
    serving_report.plot(run, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_numbers_are_short() -> None:
    assert list(map(short, (1234.5, 12.345, 0.01234, None))) == ["1,234", "12.3", "0.0123", "-"]


def test_the_cache_holds_what_is_asked_for() -> None:
    sizes = Sizes()
    assert sizes.cache_tokens > 2 * sizes.long_prompt + max(sizes.clients) * (sizes.short_prompt + sizes.short_reply)


@pytest.mark.parametrize("arguments", [["--parts", "load,none"], ["--repeats", "0"], ["--model", "large"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "error" in capsys.readouterr().err
