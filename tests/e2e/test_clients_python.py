"""The official Python clients over real connections: chunks as they come, time-outs, clients that go away, keys."""

import asyncio
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from e2e.clients.servers import ServerProcess, nano_server

pytestmark = pytest.mark.slow

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
KEY = "a-key-that-is-long-enough"
LETTERS = {"regex": "[a-z ]{3990,}"}  # an answer that does not end by itself
OPENAI_LONG: dict[str, Any] = {
    "model": "nano",
    "messages": HELLO,
    "reasoning_effort": "none",
    "extra_body": {"structured_outputs": LETTERS},
}
ANTHROPIC_LONG: dict[str, Any] = {
    "model": "nano",
    "messages": HELLO,
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "string", "pattern": "^[a-z ]{3990,}$"}}},
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with nano_server() as server:
        yield server


@pytest.fixture
def chat(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def messages(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def check_arrivals(started: float, arrivals: list[float]) -> None:
    """Chunks came one by one while the answer was made, not together at its end."""
    total = arrivals[-1] - started
    assert len(arrivals) > 50
    assert arrivals[0] - started < total / 2
    longest = max(after - before for before, after in pairwise(arrivals))
    assert longest < total / 2, "the chunks came in one piece"


def test_openai_chunks_come_one_by_one(chat: openai.OpenAI) -> None:
    started, arrivals = time.monotonic(), []
    for _ in chat.chat.completions.create(**OPENAI_LONG, stream=True, max_completion_tokens=400):
        arrivals.append(time.monotonic())
    check_arrivals(started, arrivals)


def test_anthropic_chunks_come_one_by_one(messages: anthropic.Anthropic) -> None:
    started, arrivals = time.monotonic(), []
    with messages.messages.stream(**ANTHROPIC_LONG, max_tokens=400) as stream:
        for _ in stream.text_stream:
            arrivals.append(time.monotonic())
    check_arrivals(started, arrivals)


def test_many_streams_at_once(server: ServerProcess) -> None:
    async def openai_stream(client: openai.AsyncOpenAI) -> list[float]:
        arrivals = []
        async for _ in await client.chat.completions.create(**OPENAI_LONG, stream=True, max_completion_tokens=200):
            arrivals.append(time.monotonic())
        return arrivals

    async def anthropic_stream(client: anthropic.AsyncAnthropic) -> list[float]:
        arrivals = []
        async with client.messages.stream(**ANTHROPIC_LONG, max_tokens=200) as stream:
            async for _ in stream.text_stream:
                arrivals.append(time.monotonic())
        return arrivals

    async def all_streams() -> list[list[float]]:
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as chat,
            anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as messages,
        ):
            return await asyncio.gather(
                *(openai_stream(chat) for _ in range(4)), *(anthropic_stream(messages) for _ in range(4))
            )

    streams = asyncio.run(all_streams())
    first_end = min(arrivals[-1] for arrivals in streams)
    assert all(arrivals[0] < first_end for arrivals in streams), "they were answered one after the other"


def test_clients_that_close_their_stream(
    chat: openai.OpenAI, messages: anthropic.Anthropic, server: ServerProcess
) -> None:
    start = len(server.log)
    stream = chat.chat.completions.create(**OPENAI_LONG, stream=True, max_completion_tokens=4000)
    for _ in range(5):
        next(stream)
    stream.close()
    with messages.messages.stream(**ANTHROPIC_LONG, max_tokens=4000) as events:
        for _ in range(5):
            next(events)
    for path in ("/v1/chat/completions", "/v1/messages"):
        left = server.wait_for(lambda line, path=path: line.get("path") == path and line["status"] == 499, start=start)
        assert left.get("completion_tokens", 0) < 2000
    server.wait_until_idle()


def test_clients_that_do_not_wait(chat: openai.OpenAI, messages: anthropic.Anthropic, server: ServerProcess) -> None:
    start = len(server.log)
    with pytest.raises(openai.APITimeoutError):
        chat.with_options(timeout=0.3).chat.completions.create(**OPENAI_LONG, max_completion_tokens=4000)
    with pytest.raises(anthropic.APITimeoutError):
        messages.with_options(timeout=0.3).messages.create(**ANTHROPIC_LONG, max_tokens=4000)
    for path in ("/v1/chat/completions", "/v1/messages"):
        server.wait_for(lambda line, path=path: line.get("path") == path and line["status"] == 499, start=start)
    server.wait_until_idle()


def test_a_task_that_is_cancelled(server: ServerProcess) -> None:
    async def cancel() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            coming = asyncio.Event()

            async def read() -> None:
                async for _ in await client.chat.completions.create(
                    **OPENAI_LONG, stream=True, max_completion_tokens=4000
                ):
                    coming.set()

            task = asyncio.create_task(read())
            await coming.wait()
            task.cancel()
            await asyncio.wait([task])

    start = len(server.log)
    asyncio.run(cancel())
    server.wait_for(lambda line: line.get("status") == 499, start=start)
    server.wait_until_idle()


def test_the_tool_runner_without_a_thread(messages: anthropic.Anthropic) -> None:
    check_runner(messages, thread=False)


def test_the_tool_runner_asks_for_a_thread(messages: anthropic.Anthropic) -> None:
    check_runner(messages)


def check_runner(messages: anthropic.Anthropic, **options: Any) -> None:
    seen: list[str] = []
    runner = messages.beta.messages.tool_runner(
        model="nano",
        max_tokens=300,
        messages=[{"role": "user", "content": "What is the weather in Oslo?"}],
        tools=[_weather(seen)],
        tool_choice={"type": "any"},
        max_iterations=2,
        **options,
    )
    assert next(iter(runner)).stop_reason == "tool_use"
    assert runner.generate_tool_call_response() is not None
    assert seen


def _weather(seen: list[str]) -> Any:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: Its name.
        """
        seen.append(city)
        return '{"celsius": 7}'

    return get_weather


def test_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text(f"{KEY}\n")
    with nano_server("--api-key-file", str(keys)) as server:
        url = f"{server.url}/v1"
        with (
            openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as right,
            openai.OpenAI(base_url=url, api_key="another-key-that-is-long-enough", max_retries=0) as wrong,
            anthropic.Anthropic(base_url=server.url, auth_token=KEY, max_retries=0) as by_token,
            anthropic.Anthropic(base_url=server.url, api_key="another-key-that-is-long", max_retries=0) as other,
        ):
            assert [model.id for model in right.models.list()] == ["nano"]
            assert by_token.messages.count_tokens(model="nano", messages=HELLO).input_tokens > 0
            with pytest.raises(openai.AuthenticationError):
                wrong.models.list()
            with pytest.raises(anthropic.AuthenticationError):
                other.messages.count_tokens(model="nano", messages=HELLO)
        assert httpx2.get(f"{server.url}/metrics").status_code == 401
