"""The official JavaScript clients against `indexshare serve nano`. `make test-e2e` installs them."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.clients.environments import node_packages
from e2e.clients.servers import ServerProcess, nano_server, refused

pytestmark = pytest.mark.slow

KEY = "a-key-that-is-long-enough"
HELLO = "I am nano, a small model that ships with indexshare."  # greedy, by default

Client = Callable[..., Any]


@pytest.fixture(scope="module")
def packages() -> Path:
    return node_packages("node")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with nano_server() as server:
        yield server


@pytest.fixture
def client(packages: Path, server: ServerProcess) -> Client:
    """Run a scenario of a script: its outcome. Other arguments: base_url, api_key."""

    def run(script: str, scenario: str, *, url: str = server.url, key: str = "none") -> Any:
        node = shutil.which("node")
        assert node is not None
        result = subprocess.run(
            [node, str(packages / f"{script}.mjs"), scenario],
            env={"PATH": os.environ["PATH"], "BASE_URL": url, "API_KEY": key},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def check_weather(arguments: dict[str, Any]) -> None:
    assert set(arguments) == {"city", "days"}
    assert len(arguments["city"]) <= 20 and 1 <= arguments["days"] <= 9


def test_openai_chat_streamed_and_not(client: Client) -> None:
    seen = client("openai", "chat")
    whole = seen["whole"]["choices"][0]
    assert whole["message"]["content"] == HELLO
    assert whole["finish_reason"] == "stop"
    assert len(whole["logprobs"]["content"]) == seen["whole"]["usage"]["completion_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in whole["logprobs"]["content"])
    assert seen["text"] == seen["streamed"]["choices"][0]["message"]["content"] == HELLO
    assert seen["chunks"] > 5
    assert seen["streamed"]["usage"]["prompt_tokens"] == seen["whole"]["usage"]["prompt_tokens"]
    assert seen["legacy"]["text"].startswith("import os")
    assert len(seen["legacy"]["logprobs"]["tokens"]) > 4
    assert seen["models"] == ["nano"]


def test_openai_tools_over_two_turns(client: Client) -> None:
    seen = client("openai", "tools")
    assert seen["reason"] == "tool_calls"
    (call,) = seen["calls"]
    check_weather(call["function"]["parsed_arguments"])
    assert seen["last"]["message"]["content"].strip()
    assert "tool_calls" not in seen["last"]["message"]
    check_weather(seen["streamed"]["tool_calls"][0]["function"]["parsed_arguments"])


def test_openai_structured_output(client: Client) -> None:
    for parsed in client("openai", "structured").values():
        assert 0 <= parsed["answer"] <= 999 and isinstance(parsed["sure"], bool)


def test_openai_reasoning(client: Client) -> None:
    seen = client("openai", "reasoning")
    assert seen["thinking"]["reasoning_content"]
    assert "reasoning_content" not in seen["plain"]
    assert 0 < seen["usage"]["completion_tokens_details"]["reasoning_tokens"] < seen["usage"]["completion_tokens"]


def test_openai_responses_over_two_turns(client: Client) -> None:
    seen = client("openai", "responses")
    assert [item["type"] for item in seen["first"]] == ["reasoning", "function_call"]
    check_weather(json.loads(seen["first"][1]["arguments"]))
    assert seen["last"]["status"] == "completed"
    assert seen["last"]["text"].strip()
    assert seen["last"]["usage"]["input_tokens_details"]["cached_tokens"] > 0
    assert seen["kinds"][0] == "response.created"
    assert seen["kinds"][-1] == "response.completed"


def test_openai_responses_that_the_client_has_parsed(client: Client) -> None:
    assert client("openai", "responses_parsed")["status"] == "completed"


def test_openai_errors(client: Client) -> None:
    seen = client("openai", "errors")
    assert (seen["unknown_field"]["kind"], seen["unknown_field"]["param"]) == ("BadRequestError", "colour")
    assert (seen["bad_value"]["kind"], seen["bad_value"]["param"]) == ("BadRequestError", "temperature")
    for name in ("unknown_model", "responses_model"):
        assert (seen[name]["kind"], seen[name]["code"]) == ("NotFoundError", "model_not_found")
        assert "nano" in seen[name]["message"]
    assert seen["no_such_path"]["kind"] == "NotFoundError"
    assert all(error["requestID"] for error in seen.values())


def test_anthropic_messages_streamed_and_not(client: Client) -> None:
    seen = client("anthropic", "messages")
    assert [block["type"] for block in seen["whole"]["content"]] == ["text"]
    assert seen["whole"]["stop_reason"] == "end_turn"
    assert seen["whole"]["content"] == seen["streamed"]["content"]
    assert seen["text"] == seen["whole"]["content"][0]["text"] == HELLO
    assert seen["kinds"].count("content_block_delta") > 5
    usage = seen["whole"]["usage"]
    assert seen["counted"]["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_anthropic_tools_over_two_turns(client: Client) -> None:
    seen = client("anthropic", "tools")
    for name in ("first", "streamed"):
        assert seen[name]["stop_reason"] == "tool_use"
        check_weather(seen[name]["content"][-1]["input"])
    assert [block["type"] for block in seen["last"]["content"]] == ["text"]


def test_anthropic_tool_runner(client: Client) -> None:
    check_runner(client("anthropic", "runner_without_thread"))


def test_anthropic_tool_runner_asks_for_a_thread(client: Client) -> None:
    check_runner(client("anthropic", "runner"))


def check_runner(seen: dict[str, Any]) -> None:
    assert seen["reasons"] == ["tool_use", "tool_use"]
    for arguments in seen["seen"]:
        check_weather(arguments)


def test_anthropic_structured_output(client: Client) -> None:
    parsed = client("anthropic", "structured")["parsed"]
    assert parsed["mood"] in ("good", "bad") and isinstance(parsed["sure"], bool)


def test_anthropic_thinking_blocks_are_sent_back(client: Client) -> None:
    seen = client("anthropic", "thinking")
    for message in seen.values():
        assert [block["type"] for block in message["content"]] == ["thinking", "text"]
        assert message["content"][0]["thinking"] and message["content"][0]["signature"]
    first, second = seen["first"]["usage"], seen["second"]["usage"]
    whole_first_turn = first["input_tokens"] + first["cache_read_input_tokens"] + first["output_tokens"]
    assert second["cache_read_input_tokens"] >= whole_first_turn - 2, "the first turn was read again"


def test_anthropic_errors(client: Client) -> None:
    seen = client("anthropic", "errors")
    assert (seen["unknown_field"]["kind"], seen["bad_value"]["kind"]) == ("BadRequestError", "BadRequestError")
    assert "colour" in seen["unknown_field"]["message"]
    assert "temperature" in seen["bad_value"]["message"]
    assert (seen["unknown_model"]["kind"], seen["unknown_model"]["type"]) == ("NotFoundError", "not_found_error")
    assert "text model" in seen["image"]["message"]


def test_anthropic_errors_have_a_request_id(client: Client) -> None:
    assert all(error["requestID"] for error in client("anthropic", "errors").values())


@pytest.mark.parametrize("script", ["openai", "anthropic"])
def test_clients_that_go_away_or_time_out(client: Client, server: ServerProcess, script: str) -> None:
    start = len(server.log)
    seen = client(script, "cancel")
    assert seen["slow"]["kind"] == "APIConnectionTimeoutError"
    server.wait_for(lambda line: line.get("status") == 499, start=start)
    server.wait_until_idle()
    assert all(line.get("completion_tokens", 0) < 2000 for line in server.requests(start))


def test_keys(client: Client, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text(f"somebody:{KEY}\n")
    with nano_server("--api-key-file", str(keys)) as server:
        for script in ("openai", "anthropic"):
            assert client(script, "key", url=server.url, key=KEY)["outcome"]["kind"] == "none"
            wrong = client(script, "key", url=server.url, key="another-key-that-is-long-enough")["outcome"]
            assert (wrong["kind"], wrong["status"]) == ("AuthenticationError", 401)
        assert {line["tenant"] for line in server.requests() if not refused([line])} == {"somebody"}
