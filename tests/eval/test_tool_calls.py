"""What counts as a well-formed tool call, and that the shipped model is asked for some."""

from typing import Any

import pytest

from indexshare.chat.types import ToolCall
from indexshare.engine.llm import load
from indexshare.eval import tool_calls
from indexshare.eval.tool_calls import is_formed, measure_tool_calls
from indexshare.train.tool_episodes import TOOLS

OFFERED = {tool.name: tool.description["function"]["parameters"] for tool in TOOLS}


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(id="1", name=name, arguments=arguments)


@pytest.mark.parametrize(
    ("calls", "formed"),
    [
        ([call("add", a=1, b=2)], True),
        ([call("convert", amount=1, source="EUR", target="USD")], True),
        ([call("create_note", title="a b", tags=["x", "y"])], True),
        ([call("switch_light", room="hall", on=False)], True),
        ([], False),
        ([call("add", a=1, b=2), call("add", a=1, b=2)], False),
        ([call("subtract", a=1, b=2)], False),
        ([call("add", a=1)], False),
        ([call("add", a=1, b=2, c=3)], False),
        ([call("add", a="1", b=2)], False),
        ([call("add", a=True, b=2)], False),
        ([call("add", a=1.5, b=2)], False),
        ([call("create_note", title="a", tags=["x", 1])], False),
    ],
)
def test_formed_is_one_call_with_the_declared_types(calls: list[ToolCall], formed: bool) -> None:
    assert is_formed(tuple(calls), OFFERED) is formed


def test_the_shipped_model_calls_tools() -> None:
    result = measure_tool_calls(load("nano", device="cpu"), num_requests=12)
    assert result.num_requests == 12
    assert result.num_right <= result.num_named <= result.num_formed
    assert result.num_formed >= 9 and result.low < result.num_formed / 12 <= result.high
    assert f"{result.num_formed} of 12 well-formed" in tool_calls.line(result)
