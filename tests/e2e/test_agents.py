"""Claude Code, Codex and opencode against the server: every request they send is accepted, and their replies are shown.

On nano they get nonsense; what they do with tools is tested with a scripted model. `make test-e2e` installs them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from e2e.clients.agents import AGENTS, Workplace
from e2e.clients.environments import node_packages
from e2e.clients.servers import ServerProcess, nano_server, refused, scripted_server
from server.dialects import reply_of

from indexshare.chat.types import Reasoning, Text, ToolCallEvent
from indexshare.server.types import ChatRequest, CompletionRequest, Piece

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COMMAND = "echo seen > proof.txt && cat proof.txt"
SHELLS = {"Bash": "command", "exec_command": "cmd", "bash": "command"}  # and how each calls its command

Agent = Callable[..., str]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with nano_server() as server:
        yield server


@pytest.fixture(params=list(AGENTS))
def agent(request: pytest.FixtureRequest) -> Agent:
    node_packages("agents")  # in a fixture, because installing may take longer than a test
    return AGENTS[request.param]


def test_a_conversation_with_nano(agent: Agent, server: ServerProcess, tmp_path: Path) -> None:
    place, start = Workplace(home=tmp_path, url=server.url), len(server.log)
    assert agent(place, "hello").strip()
    assert agent(place, "and again", again=True).strip()
    requests = server.requests(start)
    assert len(requests) >= 2
    assert not refused(requests)
    assert any(
        line.get("cached_tokens", 0) > 0.9 * line["prompt_tokens"] for line in requests if "prompt_tokens" in line
    )
    server.wait_until_idle()


def run_a_command(request: ChatRequest | CompletionRequest) -> Sequence[Piece]:
    """A model that calls the shell once and says that it is done when it has the result."""
    assert isinstance(request, ChatRequest)
    names = {tool["function"]["name"] for tool in request.tools}
    shells = [name for name in SHELLS if name in names]
    if not shells or _results(request):
        return reply_of(Reasoning("It is written."), Text("The file is there."))
    call = ToolCallEvent("call_1", shells[0], {SHELLS[shells[0]]: COMMAND, **_described(request, shells[0])})
    return reply_of(Reasoning("I need a file."), call, reason="tool_calls")


def _results(request: ChatRequest) -> list[Mapping[str, Any]]:
    return [message for message in request.messages if message["role"] == "tool"]


def _described(request: ChatRequest, shell: str) -> dict[str, str]:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in request.tools}
    return {"description": "Write a file"} if "description" in schemas[shell]["properties"] else {}


def test_tools_and_reasoning_come_back(agent: Agent, tmp_path: Path) -> None:
    with scripted_server(run_a_command) as (url, service):
        place = Workplace(home=tmp_path, url=url, may_run_commands=True)
        assert agent(place, "Write a file.", thinking=True) == "The file is there."
        assert (place.folder / "proof.txt").read_text() == "seen\n"
        assert agent(place, "And now?", again=True, thinking=True) == "The file is there."
        request = service.seen[-1]
    assert isinstance(request, ChatRequest)
    assert request.reasoning_effort == "high"
    assert "seen" in str(_results(request)[0]["content"])
    reasoning = [message.get("reasoning_content") for message in request.messages if message["role"] == "assistant"]
    assert reasoning == ["I need a file.", "It is written."], "the prompt must only grow, or nothing of it is reused"
