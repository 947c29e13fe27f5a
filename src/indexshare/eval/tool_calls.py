"""Tool calls without constraints: how many of a model's replies to new requests are calls in GLM's form, and right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from indexshare.chat.types import ToolCall
from indexshare.engine.llm import LLM
from indexshare.eval.retrieval import wilson_interval
from indexshare.train.tool_episodes import TOOLS

CALL_TOKENS = 128
MAX_OTHER_TOOLS = 2  # beside the one that is wanted
STREAM = 0x7001  # of random numbers: training draws from others, so that requests are new


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """Counts of num_requests replies, each a part of the one before.

    num_formed: one call in GLM's form to a tool that was offered, with a JSON value of the declared type for every
    parameter and nothing else; low, high: its 95 % interval (Wilson). num_named: to the right tool; num_right: with the
    right values.
    """

    num_requests: int
    num_formed: int
    low: float
    high: float
    num_named: int
    num_right: int


def measure_tool_calls(
    llm: LLM, *, num_requests: int = 100, seed: int = 0, report: Callable[[int, int], None] | None = None
) -> ToolResult:
    """Ask for uses of the tools that nano was trained on, with new values; greedy, without thinking or a grammar.

    report(requests done, requests in all).
    """
    rng = np.random.default_rng([STREAM, seed])
    formed = named = right = 0
    for done in range(1, num_requests + 1):
        tools = [TOOLS[i] for i in rng.permutation(len(TOOLS))[: 1 + int(rng.integers(MAX_OTHER_TOOLS + 1))]]
        wanted = tools[int(rng.integers(len(tools)))]
        use = wanted.make_use(rng)
        reply = llm.chat(
            [{"role": "user", "content": use.request}],
            tools=[tool.description for tool in tools],
            enable_thinking=False,
            max_new_tokens=CALL_TOKENS,
            temperature=0.0,
        )
        offered = {tool.name: tool.description["function"]["parameters"] for tool in tools}
        if reply.finish_reason == "tool_calls" and is_formed(reply.tool_calls, offered):
            call = reply.tool_calls[0]
            formed += 1
            named += call.name == wanted.name
            right += call.name == wanted.name and call.arguments == use.arguments
        if report is not None:
            report(done, num_requests)
    low, high = wilson_interval(formed, num_requests)
    return ToolResult(
        num_requests=num_requests, num_formed=formed, low=low, high=high, num_named=named, num_right=right
    )


def is_formed(calls: tuple[ToolCall, ...], offered: dict[str, dict[str, Any]]) -> bool:
    """Whether there is one call, to a tool in `offered` (parameters by name), whose arguments are of its types."""
    if len(calls) != 1 or calls[0].name not in offered:
        return False
    types = offered[calls[0].name]["properties"]
    arguments = calls[0].arguments
    return arguments.keys() == types.keys() and all(
        _has_type(arguments[name], schema["type"]) for name, schema in types.items()
    )


def _has_type(value: Any, kind: str) -> bool:
    if kind == "array":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return kind == "boolean"
    wanted = {"string": str, "integer": int, "number": (int, float)}.get(kind)
    return wanted is not None and isinstance(value, wanted)


def line(result: ToolResult) -> str:
    """The figures as text."""
    return (
        f"tool calls without constraints: {result.num_formed} of {result.num_requests} well-formed "
        f"({result.low:.1%} to {result.high:.1%}), {result.num_named} to the right tool, {result.num_right} with the "
        "right values"
    )
