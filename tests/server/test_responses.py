"""OpenAI's Responses API, driven by the official client."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from server.dialects import (
    MODEL,
    USAGE,
    StuckService,
    http_client,
    leave_when_stuck,
    post,
    post_now,
    read_events,
    reply_of,
)
from server.scripted import ScriptedService

from indexshare.chat.types import Done, Error, Event, Reasoning, Start, Text, ToolCallEvent, Warning
from indexshare.engine.sampler import SampledToken
from indexshare.errors import IndexShareError, MemoryLimitError, OverloadedError, RequestError
from indexshare.server.responses import routes
from indexshare.server.types import ChatRequest, OutputFormat, Piece, ToolChoice

PATH = "/v1/responses"
CALL = ToolCallEvent("call_1", "weather", {"city": "Oslo", "days": 2})
ARGUMENTS = '{"city":"Oslo","days":2}'
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "What it is like outside",
    "parameters": {"type": "object"},
    "strict": False,
}
FUNCTION = {
    "name": "weather",
    "description": "What it is like outside",
    "parameters": {"type": "object"},
    "strict": False,
}


def playing(*events: Event, **how: Any) -> ScriptedService:
    return ScriptedService(lambda request: reply_of(*events, **how))


def with_client(service: ScriptedService, use: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with http_client(routes, service) as http:
            return await use(openai.AsyncOpenAI(http_client=http, api_key="x", max_retries=0))

    return asyncio.run(run())


def create(service: ScriptedService, **fields: Any) -> Response:
    body: dict[str, Any] = {"model": MODEL, "input": "Hello", **fields}
    return with_client(service, lambda client: client.responses.create(**body))


def translated(**fields: Any) -> ChatRequest:
    service = playing(Text("x"))
    create(service, **fields)
    (request,) = service.seen
    assert isinstance(request, ChatRequest)
    return request


def refusal(**fields: Any) -> str:
    """The message of a 400; nothing was generated."""
    service = playing(Text("x"))
    status, body = post_now(routes, service, PATH, {"model": MODEL, "input": "Hello", **fields})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error"), body
    assert not service.seen
    return body["error"]["message"]


def streamed(service: ScriptedService, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "input": "Hello", "stream": True, **fields}
    return read_events(asyncio.run(post(routes, service, PATH, body)).text)


def test_a_reply() -> None:
    response = create(playing(Text("Good "), Text("day")), metadata={"key": "value"}, temperature=0.5, store=True)
    Response.model_validate(response.to_dict())
    assert response.output_text == "Good day"
    assert (response.object, response.status, response.model, response.id[:5]) == (
        "response",
        "completed",
        MODEL,
        "resp_",
    )
    assert (response.metadata, response.temperature, response.to_dict()["store"]) == ({"key": "value"}, 0.5, False)
    assert response.usage is not None
    assert response.usage.to_dict() == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12,
    }


def test_the_request_is_translated() -> None:
    request = translated(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        ],
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.9,
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "low"},
        include=["reasoning.encrypted_content"],
        prompt_cache_key="key",
        safety_identifier="somebody",
        service_tier="auto",
        truncation="auto",
        parallel_tool_calls=False,
        previous_response_id=None,
        extra_body={"client_metadata": {"a": "b"}},
    )
    assert request == ChatRequest(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        tools=[],
        tool_choice=ToolChoice(parallel=False),
        reasoning_effort="low",
        clear_thinking=False,
        sampling={"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9},
    )


def test_tools_over_several_turns() -> None:
    service = playing(Reasoning("Look."), Text("I look."), CALL, reason="tool_calls")
    first = create(service, tools=[TOOL])
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    Response.model_validate(first.to_dict())
    call = first.output[2].to_dict()
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_1", "weather", ARGUMENTS)
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    items = [
        {"role": "user", "content": "Hello"},
        *first.output,
        {"type": "function_call_output", "call_id": "call_1", "output": "Rain"},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "Wet"}, image]},
    ]
    create(service, tools=[TOOL], input=items)
    request = service.seen[1]
    assert isinstance(request, ChatRequest)
    assert request.messages == [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "reasoning_content": "Look.",
            "content": [{"type": "text", "text": "I look."}],
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Wet"}, {"type": "image"}]},
    ]


def test_parts_of_a_turn_keep_their_order() -> None:
    reasoning = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    call = {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"}
    said = {"role": "assistant", "content": "So"}
    opaque = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "S"}], "encrypted_content": "?"}
    messages = translated(input=[opaque, call, call, reasoning, said, said, call]).messages
    assert [sorted(message.keys() - {"role"}) for message in messages] == [
        ["tool_calls"],
        ["content", "reasoning_content"],
        ["content", "tool_calls"],
    ]
    assert len(messages[0]["tool_calls"]) == 2


def test_tools_that_codex_sends() -> None:
    space = {
        "type": "namespace",
        "name": "files",
        "description": "Tools of a server",
        "tools": [{"type": "function", "name": "read", "parameters": {}, "strict": False, "defer_loading": True}],
    }
    hosted = [
        {"type": "web_search", "external_web_access": False},
        {"type": "image_generation", "output_format": "png"},
    ]
    service = playing(ToolCallEvent("call_1", "files__read", {}), reason="tool_calls")
    response = create(service, tools=[*hosted, TOOL, space], tool_choice="auto")
    assert response.to_dict()["tools"] == [TOOL, space]
    call = response.output[0].to_dict()
    assert (call["name"], call["namespace"]) == ("read", "files")
    create(
        service, tools=[TOOL, space], input=[call, {"type": "function_call_output", "call_id": "call_1", "output": ""}]
    )
    first, second = service.seen
    assert isinstance(first, ChatRequest) and isinstance(second, ChatRequest)
    assert [tool["function"]["name"] for tool in first.tools] == ["weather", "files__read"]
    assert second.messages[0]["tool_calls"][0]["function"]["name"] == "files__read"


@pytest.mark.parametrize(
    ("wire", "neutral"),
    [
        ("auto", ToolChoice()),
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        ({"type": "function", "name": "weather"}, ToolChoice(mode="required", name="weather")),
    ],
)
def test_tool_choice(wire: Any, neutral: ToolChoice) -> None:
    request = translated(tools=[TOOL], tool_choice=wire)
    assert request.tool_choice == neutral
    assert request.tools == [{"type": "function", "function": FUNCTION}]


@pytest.mark.parametrize(
    ("wire", "neutral"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, OutputFormat(kind="json_object")),
        (
            {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True},
            OutputFormat(kind="json_schema", definition={"type": "object"}),
        ),
    ],
)
def test_output_format(wire: Any, neutral: OutputFormat | None) -> None:
    service = playing(Text("x"))
    response = create(service, text={"format": wire})
    assert response.to_dict()["text"] == {"format": wire}
    assert service.seen[0].output_format == neutral


def test_reasoning_of_earlier_turns_may_be_left_out() -> None:
    assert translated(reasoning={"context": "current_turn"}).clear_thinking is True


def test_the_events_of_a_stream() -> None:
    script = (Reasoning("Hm"), Warning("?"), Text("Y"), Text("es"), CALL)
    events = streamed(playing(*script, reason="tool_calls"), tools=[TOOL])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    parser: pydantic.TypeAdapter[ResponseStreamEvent] = pydantic.TypeAdapter(ResponseStreamEvent)
    for event in events:
        assert parser.validate_python(event).type == event["type"]
    opened, closed = ("output_item.added", "content_part.added"), ("content_part.done", "output_item.done")
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *(*opened, "reasoning_text.delta", "reasoning_text.done", *closed),
        *(*opened, "output_text.delta", "output_text.delta", "output_text.done", *closed),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert [event["output_index"] for event in events[2:-1]] == [0] * 6 + [1] * 7 + [2] * 4
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == items
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in items]
    assert {event["item_id"] for event in events if "item_id" in event} == set(added)


def test_the_stream_helper_puts_the_same_response_together() -> None:
    script = (Reasoning("Hm."), Text("Yes\u2028"), Text("\n"), CALL, ToolCallEvent("call_2", "weather", {}))

    async def use(client: openai.AsyncOpenAI) -> Any:
        async with client.responses.stream(model=MODEL, input="Hello", tools=[TOOL]) as stream:
            async for event in stream:
                if event.type == "response.output_text.done":
                    assert event.text == "Yes\u2028\n"
            return await stream.get_final_response()

    final = with_client(playing(*script, reason="tool_calls"), use)
    whole = create(playing(*script, reason="tool_calls"), tools=[TOOL])
    assert final.output_text == whole.output_text == "Yes\u2028\n"
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output[2].arguments == ARGUMENTS


def test_a_reply_that_is_cut_off() -> None:
    response = create(playing(Text("So"), reason="length"))
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].to_dict()["status"] == "incomplete"
    assert streamed(playing(Text("So"), reason="length"))[-1]["type"] == "response.incomplete"


def test_reasoning_tokens_are_counted() -> None:
    token = SampledToken(token_id=1)
    script = [
        Piece(events=(Start(7), Reasoning("H")), tokens=(token, token)),
        Piece(events=(), tokens=(token,)),
        Piece(events=(Text("a"),), tokens=(token,)),
        Piece(events=(Done("stop", replace(USAGE, num_reasoning_tokens=3)),), tokens=(token,)),
    ]
    response = create(ScriptedService(lambda request: script))
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 3


def test_selections() -> None:
    script = [
        Piece(events=(Start(7), Text("Ye")), selection="one"),
        Piece(events=(), selection="two"),
        *reply_of()[1:],
    ]
    service = ScriptedService(lambda request: script)

    async def use(client: openai.AsyncOpenAI) -> list[Any]:
        body = {"indexshare": {"selected": True}}
        stream = await client.responses.create(model=MODEL, input="Hello", stream=True, extra_body=body)
        return [event.to_dict() async for event in stream]

    found = [(event["type"], event["indexshare"]) for event in with_client(service, use) if "indexshare" in event]
    assert found == [
        ("response.output_text.delta", {"selected": "one"}),
        ("response.indexshare", {"selected": "two"}),
    ]
    response = create(service, extra_body={"indexshare": {"selected": True}})
    assert response.to_dict()["indexshare"] == {"selected": ["one", "two"]}
    assert all(request.wants_selection for request in service.seen)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, r"input\[0\].*item_reference.*nothing is stored"),
        ({"input": [{"type": "computer_call", "id": "a"}]}, "computer_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, r"input\[0\]\.content\[0\].*text model"),
        ({"input": [{"role": "user", "content": "a", "mood": 1}]}, r"input\[0\].*mood"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "name"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].*web_search"),
        ({"tools": [TOOL, {"type": "local_shell"}]}, r"tools\[1\].*local_shell"),
        ({"tools": [{"type": "custom", "name": "a"}]}, "custom"),
        ({"tools": [TOOL, TOOL]}, "two tools named 'weather'"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]},
            r"tools\[0\]\.tools\[0\].*custom",
        ),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"previous_response_id": "resp_1"}, "nothing is stored"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "a"}}, "prompt"),
        ({"include": ["message.output_text.logprobs"]}, "log-probabilities"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"text": {"format": {"type": "grammar"}}}, "grammar"),
        ({"reasoning": {"mode": "pro"}}, "mode"),
        ({"mood": "good"}, "mood"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(refusal(**fields))


def test_another_model_is_not_found() -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; use 'scripted'"):
        create(playing(), model="other")


ODD = [-1, 0, 2**31, 2**63, 10**400, 1e308, -0.5, True, "1", [], {}]
NUMBERS = ["max_output_tokens", "temperature", "top_p", "top_logprobs", "max_tool_calls"]


@pytest.mark.parametrize(("field", "value"), list(product(NUMBERS, ODD)))
def test_odd_numbers_are_the_clients_mistake(field: str, value: Any) -> None:
    if value == 0 and field in ("temperature", "top_logprobs", "max_tool_calls"):
        translated(extra_body={field: value})
    else:
        refusal(**{field: value})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestError("no"), openai.BadRequestError),
        (MemoryLimitError("no"), openai.BadRequestError),
        (OverloadedError("no", retry_after=1), openai.RateLimitError),
    ],
)
def test_errors_before_the_reply(error: IndexShareError, kind: type[openai.APIStatusError]) -> None:
    def script(request: object) -> Sequence[Piece]:
        raise error

    for stream in (False, True):
        with pytest.raises(kind, match="no"):
            create(ScriptedService(script), stream=stream)


def test_errors_in_the_middle() -> None:
    script = [Piece(events=(Start(7), Text("So"))), Piece(events=(Error("the engine broke"),))]
    service = ScriptedService(lambda request: script)
    with pytest.raises(openai.InternalServerError, match="the engine broke"):
        create(service)
    last = streamed(service)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the engine broke"}
    assert streamed(playing(Text("a"), reason="cancelled"))[-1]["type"] == "response.failed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_closes_the_reply(stream: bool) -> None:
    service = StuckService(lambda request: [Piece(events=(Start(7), Text("So")))])
    sent = asyncio.run(leave_when_stuck(routes, service, PATH, {"model": MODEL, "input": "Hi", "stream": stream}))
    assert service.replies[0].closed
    assert bool(sent) == stream
