"""Anthropic's Messages API, driven by the official client."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from itertools import product
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from server.dialects import MODEL, StuckService, http_client, leave_when_stuck, post, post_now, read_events, reply_of
from server.scripted import ScriptedService

from indexshare.chat.types import Error, Event, Reasoning, Start, Text, ToolCallEvent, Warning
from indexshare.errors import IndexShareError, MemoryLimitError, OverloadedError, RequestError
from indexshare.server.messages import routes
from indexshare.server.system_prompt import without_header_lines
from indexshare.server.types import ChatRequest, OutputFormat, Piece, ToolChoice

PATH = "/v1/messages"
HELLO: Any = [{"role": "user", "content": "Hello"}]
CALL = ToolCallEvent("call_1", "weather", {"city": "Oslo", "days": 2})
TOOL: Any = {"name": "weather", "description": "What it is like outside", "input_schema": {"type": "object"}}


def playing(*events: Event, **how: Any) -> ScriptedService:
    return ScriptedService(lambda request: reply_of(*events, **how))


def with_client(service: ScriptedService, use: Callable[[anthropic.AsyncAnthropic], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with http_client(routes, service) as http:
            return await use(anthropic.AsyncAnthropic(http_client=http, api_key="x", max_retries=0))

    return asyncio.run(run())


def create(service: ScriptedService, **fields: Any) -> Message:
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": HELLO, **fields}
    return with_client(service, lambda client: client.messages.create(**body))


def translated(**fields: Any) -> ChatRequest:
    service = playing(Text("x"))
    create(service, **fields)
    (request,) = service.seen
    assert isinstance(request, ChatRequest)
    return request


def refusal(**fields: Any) -> str:
    """The message of a 400; nothing was generated."""
    service = playing(Text("x"))
    status, body = post_now(routes, service, PATH, {"model": MODEL, "max_tokens": 100, "messages": HELLO, **fields})
    assert (status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error"), body
    assert not service.seen
    return body["error"]["message"]


def streamed(service: ScriptedService, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "max_tokens": 100, "messages": HELLO, "stream": True, **fields}
    return read_events(asyncio.run(post(routes, service, PATH, body)).text)


def test_a_reply() -> None:
    message = create(playing(Text("Good "), Text("day")))
    assert message.content[0].to_dict() == {"type": "text", "text": "Good day"}
    assert (message.type, message.role, message.model, message.id[:4]) == ("message", "assistant", MODEL, "msg_")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.to_dict() == {
        "input_tokens": 4,  # without those that came from the cache
        "cache_read_input_tokens": 3,
        "cache_creation_input_tokens": 0,
        "output_tokens": 5,
    }


def test_the_request_is_translated() -> None:
    request = translated(
        system=[
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Be kind."},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
            {"role": "assistant", "content": "Yes"},
            {"role": "system", "content": "The time is 9."},
            {"role": "user", "content": "Three"},
        ],
        stop_sequences=["END"],
        metadata={"user_id": "somebody"},
        service_tier="auto",
        extra_body={
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "container": None,
            "context_management": {"edits": []},
            "betas": ["x"],
            "speed": "standard",
            "mcp_servers": [],
        },
    )
    assert request == ChatRequest(
        messages=[
            {"role": "system", "content": "Be brief.\n\nBe kind."},
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
            {"role": "assistant", "content": "Yes"},
            {"role": "system", "content": [{"type": "text", "text": "The time is 9."}]},
            {"role": "user", "content": [{"type": "text", "text": "Three"}]},
        ],
        tools=[],
        enable_thinking=False,
        clear_thinking=False,
        sampling={"max_new_tokens": 100, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "stop": ["END"]},
    )


def test_tools_over_several_turns() -> None:
    service = playing(Reasoning("Look."), Text("I look."), CALL, reason="tool_calls")
    thinking: Any = {"type": "enabled", "budget_tokens": 50}
    first = create(service, tools=[TOOL], thinking=thinking)
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    call = first.content[2]
    assert call.to_dict() == {"type": "tool_use", "id": "call_1", "name": "weather", "input": dict(CALL.arguments)}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "Rain"}]}
    messages = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {**result, "is_error": True}, {"type": "text", "text": "And now?"}]},
    ]
    create(service, tools=[TOOL], thinking=thinking, messages=messages)
    request = service.seen[1]
    assert isinstance(request, ChatRequest)
    function = {"name": "weather", "arguments": dict(CALL.arguments)}
    assert request.messages[1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Look.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Rain"}]},
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": [{"type": "text", "text": "Error: "}, {"type": "text", "text": "Rain"}],
        },
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]


def test_tools_are_translated() -> None:
    late = {"name": "late", "input_schema": {}, "type": "custom", "defer_loading": True, "cache_control": None}
    request = translated(tools=[TOOL, late], tool_choice={"type": "tool", "name": "weather"})
    schema = {"name": "weather", "description": "What it is like outside", "parameters": {"type": "object"}}
    assert request.tools == [
        {"type": "function", "function": schema},
        {"type": "function", "function": {"name": "late", "parameters": {}, "defer_loading": True}},
    ]
    assert request.tool_choice == ToolChoice(mode="required", name="weather")


@pytest.mark.parametrize(
    ("wire", "neutral"),
    [
        ({"type": "auto"}, ToolChoice()),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(parallel=False)),
        ({"type": "any"}, ToolChoice(mode="required")),
        ({"type": "none"}, ToolChoice(mode="none")),
    ],
)
def test_tool_choice(wire: Any, neutral: ToolChoice) -> None:
    assert translated(tools=[TOOL], tool_choice=wire).tool_choice == neutral


def test_a_tool_result_may_load_tools_or_show_an_image() -> None:
    reference = {"type": "tool_reference", "tool_name": "late"}
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    content = [{"type": "tool_result", "tool_use_id": "a", "content": [part]} for part in (reference, image)]
    request = translated(
        messages=[{"role": "user", "content": [*content, {"type": "tool_result", "tool_use_id": "b"}]}]
    )
    assert request.messages == [
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "tool_reference", "name": "late"}]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "image"}]},
        {"role": "tool", "tool_call_id": "b", "content": []},
    ]


@pytest.mark.parametrize(
    ("thinking", "enabled", "budget"),
    [
        (None, False, None),
        ({"type": "disabled"}, False, None),
        ({"type": "enabled", "budget_tokens": 99}, True, 99),
        ({"type": "adaptive", "display": "omitted"}, True, None),
    ],
)
def test_thinking(thinking: Any, enabled: bool, budget: int | None) -> None:
    request = translated(extra_body={"thinking": thinking}, output_config={"effort": "high"})
    assert (request.enable_thinking, request.thinking_budget) == (enabled, budget)
    assert request.reasoning_effort == ("high" if enabled else None)


def test_earlier_thinking_goes_into_the_prompt() -> None:
    content = [
        {"type": "redacted_thinking", "data": "?"},
        {"type": "thinking", "thinking": "Hm.", "signature": "of another server"},
        {"type": "text", "text": "Yes"},
    ]
    messages = [*HELLO, {"role": "assistant", "content": content}, {"role": "assistant", "content": "!"}, *HELLO]
    request = translated(messages=messages)
    assert request.messages[1] == {"role": "assistant", "content": "Yes!", "reasoning_content": "Hm."}
    assert request.clear_thinking is False


@pytest.mark.parametrize("field", ["output_format", "output_config"])
def test_output_format(field: str) -> None:
    wanted = {"type": "json_schema", "schema": {"type": "object"}}
    body = {field: wanted if field == "output_format" else {"format": wanted}}
    assert translated(extra_body=body).output_format == OutputFormat(kind="json_schema", definition={"type": "object"})


HEADER = "x-anthropic-billing-header: cc_version=2.1.1.abc; cc_entrypoint=cli; cch=1a2b3;"


@pytest.mark.parametrize(
    ("system", "rest"),
    [
        (HEADER, ""),
        (f"{HEADER}\nYou are an agent.", "You are an agent."),
        (f"{HEADER}\n x-anthropic-other: 1\n\nYou are.\n", "You are.\n"),
        ("You are.", "You are."),
        (f"You are.\n{HEADER}", f"You are.\n{HEADER}"),
        ("  You are.", "  You are."),
        ("x-anthropic-: no header", "x-anthropic-: no header"),
        ("", ""),
    ],
)
def test_header_lines_are_left_out(system: str, rest: str) -> None:
    assert without_header_lines(system) == rest


def test_a_header_block_does_not_change_the_prompt() -> None:
    blocks = [{"type": "text", "text": HEADER}, {"type": "text", "text": "You are an agent."}]
    assert translated(system=blocks).messages == translated(system="You are an agent.").messages


def test_the_events_of_a_stream() -> None:
    events = streamed(playing(Reasoning("H"), Reasoning("m"), Warning("?"), Text("Yes"), CALL, reason="tool_calls"))
    signature = events[4]["delta"]["signature"]
    assert signature
    usage = {"input_tokens": 4, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 0, "output_tokens": 0}
    message = events[0].pop("message")
    assert {key: message[key] for key in ("type", "role", "content", "stop_reason", "usage")} == {
        "type": "message",
        "role": "assistant",
        "content": [],
        "stop_reason": None,
        "usage": usage,
    }
    delta, start, stop = "content_block_delta", "content_block_start", "content_block_stop"
    tool = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {}}
    assert events == [
        {"type": "message_start"},
        {"type": start, "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
        {"type": delta, "index": 0, "delta": {"type": "thinking_delta", "thinking": "H"}},
        {"type": delta, "index": 0, "delta": {"type": "thinking_delta", "thinking": "m"}},
        {"type": delta, "index": 0, "delta": {"type": "signature_delta", "signature": signature}},
        {"type": stop, "index": 0},
        {"type": start, "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": delta, "index": 1, "delta": {"type": "text_delta", "text": "Yes"}},
        {"type": stop, "index": 1},
        {"type": start, "index": 2, "content_block": tool},
        {"type": delta, "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"city":"Oslo","days":2}'}},
        {"type": stop, "index": 2},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {**usage, "output_tokens": 5},
        },
        {"type": "message_stop"},
    ]


def test_the_stream_helper_puts_the_same_message_together() -> None:
    script = (Reasoning("Hm."), Text("Yes\u2028"), Text("\n"), CALL, ToolCallEvent("call_2", "now", {}))

    async def use(client: anthropic.AsyncAnthropic) -> Message:
        async with client.messages.stream(model=MODEL, max_tokens=9, messages=HELLO) as stream:
            return await stream.get_final_message()

    final = with_client(playing(*script, reason="tool_calls"), use).to_dict()
    whole = create(playing(*script, reason="tool_calls")).to_dict()
    assert final.pop("stop_details") is None  # the client's own
    assert {**final, "id": None} == {**whole, "id": None}


@pytest.mark.parametrize(
    ("events", "reason", "stop_reason"),
    [
        ([Text("a")], "length", "max_tokens"),
        ([CALL], "length", "max_tokens"),
        ([Text("a")], "tool_calls", "end_turn"),  # no block, no promise of one
        ([CALL], "stop", "tool_use"),
        ([], "stop", "end_turn"),
    ],
)
def test_stop_reasons(events: list[Event], reason: Any, stop_reason: str) -> None:
    assert create(playing(*events, reason=reason)).stop_reason == stop_reason


def test_blank_text_makes_no_block_and_is_not_lost_before_text() -> None:
    assert create(playing(Text("\n"), Text(" "), CALL)).content[0].type == "tool_use"
    assert create(playing(Text("\n"), Text(" a"), Text("\n"))).content[0].to_dict()["text"] == "\n a\n"


def test_the_beta_client_is_served() -> None:
    service = playing(Text("x"))

    async def use(client: anthropic.AsyncAnthropic) -> Any:
        return await client.beta.messages.create(  # its path has a query string
            model=MODEL, max_tokens=9, messages=HELLO, betas=["context-management-2025-06-27"]
        )

    assert with_client(service, use).content[0].text == "x"


def test_count_tokens() -> None:
    service = playing()

    async def use(client: anthropic.AsyncAnthropic) -> Any:
        return await client.messages.count_tokens(
            model=MODEL,
            messages=HELLO,
            system="Be brief.",
            tools=[TOOL],
            thinking={"type": "enabled", "budget_tokens": 9},
        )

    assert with_client(service, use).input_tokens == 42
    (request,) = service.seen
    assert isinstance(request, ChatRequest)
    assert (len(request.messages), len(request.tools), request.thinking_budget) == (2, 1, 9)


def test_selections() -> None:
    script = [
        Piece(events=(Start(7), Text("Ye")), selection="one"),
        Piece(events=(), selection="two"),
        Piece(events=(Text("s"),)),
        *reply_of()[1:],
    ]
    service = ScriptedService(lambda request: script)
    events = streamed(service, indexshare={"selected": True})
    found = [(event["type"], event["indexshare"]["selected"]) for event in events if "indexshare" in event]
    assert found == [("content_block_delta", "one"), ("ping", "two")]
    body = {"model": MODEL, "max_tokens": 9, "messages": HELLO, "indexshare": {"selected": True}}
    assert post_now(routes, service, PATH, body)[1]["indexshare"] == {"selected": ["one", "two"]}
    assert [request.wants_selection for request in service.seen if isinstance(request, ChatRequest)] == [True, True]
    assert not translated().wants_selection


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "prefilled"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "text model"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            r"messages\[0\]\.content\[0\].*text model",
        ),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, r"content\[0\].*text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "mood": 1}]}]}, "mood"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "tool_use"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\].*web_search_20250305"),
        ({"tools": [{"name": "a"}]}, "input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "auto", "name": "a"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "less than max_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 10}}, "budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"output_config": {"effort": "enormous"}}, "effort"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"mood": "good"}, "mood"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(refusal(**fields))


def test_another_model_is_not_found() -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no 'other'; use 'scripted'"):
        create(playing(), model="other")


ODD = [-1, 0, 2**31, 2**63, 10**400, 1e308, -0.5, True, "1", [], {}]
NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "thinking"]


@pytest.mark.parametrize(("field", "value"), list(product(NUMBERS, ODD)))
def test_odd_numbers_are_the_clients_mistake(field: str, value: Any) -> None:
    if field in ("temperature", "top_k") and value == 0:
        translated(extra_body={field: value})
    else:
        refusal(**{field: {"type": "enabled", "budget_tokens": value} if field == "thinking" else value})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestError("no"), anthropic.BadRequestError),
        (MemoryLimitError("no"), anthropic.BadRequestError),
        (OverloadedError("no", retry_after=1), anthropic.RateLimitError),
    ],
)
def test_errors_before_the_reply(error: IndexShareError, kind: type[anthropic.APIStatusError]) -> None:
    def script(request: object) -> Sequence[Piece]:
        raise error

    for stream in (False, True):
        with pytest.raises(kind, match="no"):
            create(ScriptedService(script), stream=stream)


FAILING = [Piece(events=(Start(7), Text("So"))), Piece(events=(Error("the engine broke"),))]


def test_errors_in_the_middle() -> None:
    service = ScriptedService(lambda request: FAILING)
    with pytest.raises(anthropic.InternalServerError, match="the engine broke"):
        create(service)
    events = streamed(service)
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "the engine broke"}}

    async def use(client: anthropic.AsyncAnthropic) -> None:
        async with client.messages.stream(model=MODEL, max_tokens=9, messages=HELLO) as stream:
            await stream.get_final_message()

    with pytest.raises(anthropic.APIStatusError, match="the engine broke"):
        with_client(service, use)
    with pytest.raises(anthropic.InternalServerError, match="cancelled"):
        create(playing(Text("a"), reason="cancelled"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_closes_the_reply(stream: bool) -> None:
    service = StuckService(lambda request: [Piece(events=(Start(7), Text("So")))])
    body = {"model": MODEL, "max_tokens": 9, "messages": HELLO, "stream": stream}
    sent = asyncio.run(leave_when_stuck(routes, service, PATH, body))
    assert service.replies[0].closed
    assert bool(sent) == stream


def test_the_tenant_is_handed_on() -> None:
    service = playing(Text("x"))
    body = {"model": MODEL, "max_tokens": 9, "messages": HELLO}
    asyncio.run(post(routes, service, PATH, body, tenant="somebody"))
    create(service)
    assert service.tenants == ["somebody", ""]
