"""The chat endpoint, driven by OpenAI's own client in process; the model is a script."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from server.scripted import ScriptedReply, ScriptedService
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message as AsgiMessage

from indexshare.chat.types import Done, Error, Event, Reasoning, Start, Text, ToolCallEvent, Usage, Warning
from indexshare.engine.sampler import SampledToken, SamplingParams
from indexshare.errors import IndexShareError, MemoryLimitError, OverloadedError, RequestError
from indexshare.server import chat_completions
from indexshare.server.http import ApiError, as_api_error, error_response
from indexshare.server.types import ChatRequest, OutputFormat, Piece, ToolChoice

HELLO = (Piece(events=(Start(7),)), Piece(events=(Text("Hello"),)), Piece(events=(Done("stop"),)))
USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}, "strict": True},
}


def played(*pieces: Piece) -> ScriptedService:
    return ScriptedService(lambda request: pieces)


def application(service: ScriptedService) -> Starlette:
    async def handle(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError | IndexShareError)
        failure = error if isinstance(error, ApiError) else as_api_error(error)
        return error_response(request.scope["path"], failure, "r")

    return Starlette(
        routes=chat_completions.routes(service), exception_handlers={ApiError: handle, IndexShareError: handle}
    )


@asynccontextmanager
async def client_of(service: ScriptedService) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(app=application(service))
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", http_client=http, api_key="x", max_retries=0)


def with_client(service: ScriptedService, action: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with client_of(service) as client:
            return await action(client)

    return asyncio.run(run())


def create(service: ScriptedService, **fields: Any) -> Any:
    """The client's answer; a list of chunks when it is streamed."""
    fields = {"model": "scripted", "messages": USER} | fields

    async def action(client: openai.AsyncOpenAI) -> Any:
        answer = await client.chat.completions.create(**fields)
        return [chunk async for chunk in answer] if fields.get("stream") else answer

    return with_client(service, action)


def post(service: ScriptedService, body: str | bytes | dict[str, Any]) -> httpx2.Response:
    content = json.dumps(body) if isinstance(body, dict) else body

    async def action(client: openai.AsyncOpenAI) -> httpx2.Response:
        http = client._client
        return await http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})

    return with_client(service, action)


def refused(**fields: Any) -> dict[str, Any]:
    service = played(*HELLO)
    response = post(service, {"model": "scripted", "messages": USER} | fields)
    assert response.status_code == 400 and not service.seen
    return response.json()["error"]


def asked(**fields: Any) -> ChatRequest:
    """The neutral request that the service sees."""
    service = played(*HELLO)
    assert post(service, {"model": "scripted", "messages": USER} | fields).status_code == 200
    (request,) = service.seen
    assert isinstance(request, ChatRequest)
    return request


# Answers


def test_a_whole_answer() -> None:
    service = played(
        Piece(events=(Start(7),), tokens=()),
        Piece(events=(Reasoning("Hm"),), tokens=(SampledToken(token_id=1), SampledToken(token_id=2))),
        Piece(events=(), tokens=(SampledToken(token_id=3),)),
        Piece(events=(Text("He"), Warning("repaired")), tokens=(SampledToken(token_id=4),)),
        Piece(events=(Text("llo"),), tokens=(SampledToken(token_id=5),)),
        Piece(events=(Done("stop", Usage(num_prompt_tokens=7, num_completion_tokens=6)),)),
    )
    answer = create(service)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "scripted"
    assert answer.system_fingerprint.startswith("indexshare-")
    (choice,) = answer.choices
    assert choice.message.content == "Hello" and choice.message.reasoning_content == "Hm"
    assert choice.message.tool_calls is None and choice.logprobs is None and choice.finish_reason == "stop"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 6, 13)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.completion_tokens_details.reasoning_tokens == 3
    assert service.replies[0].closed


def test_a_streamed_answer() -> None:
    service = played(
        Piece(events=(Start(7),)),
        Piece(events=(Reasoning("Hm"), Text("Hello")), tokens=(SampledToken(token_id=1),)),
        Piece(events=(Done("length"),)),
    )
    chunks = create(service, stream=True, stream_options={"include_usage": True})
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    *parts, last = chunks
    deltas = [chunk.choices[0].delta for chunk in parts]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert deltas[1].reasoning_content == "Hm" and deltas[1].content is None and deltas[1].role is None
    assert deltas[2].content == "Hello"
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None, None, None, "length"]
    assert all(chunk.usage is None for chunk in parts)
    assert last.choices == [] and last.usage.completion_tokens == 1
    assert service.replies[0].closed


def test_a_stream_ends_with_done_and_has_usage_only_when_asked() -> None:
    text = post(played(*HELLO), {"messages": USER, "stream": True}).text
    assert text.endswith("data: [DONE]\n\n") and "usage" not in text


def test_tool_calls_over_several_turns() -> None:
    call = ToolCallEvent("call_1_0", "weather", {"city": "Zürich", "days": 10**30})
    script = {
        1: (
            Piece(events=(Start(7), Reasoning("Look."))),
            Piece(events=(call, ToolCallEvent("call_1_1", "weather", {}))),
            Piece(events=(Done("tool_calls"),)),
        ),
        4: HELLO,
    }
    service = ScriptedService(lambda request: script[len(request.messages)])

    async def action(client: openai.AsyncOpenAI) -> Any:
        messages: list[Any] = list(USER)
        first = await client.chat.completions.create(model="scripted", messages=messages, tools=[WEATHER])
        (choice,) = first.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Zürich", "days": 1%s}' % ("0" * 30)
        messages.append(choice.message)  # as the client's documentation tells people to
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in choice.message.tool_calls]
        return await client.chat.completions.create(model="scripted", messages=messages, tools=[WEATHER])

    assert with_client(service, action).choices[0].message.content == "Hello"
    second = service.seen[1]
    assert isinstance(second, ChatRequest)
    assistant = second.messages[1]
    assert assistant["reasoning_content"] == "Look."
    assert [one["function"]["arguments"] for one in assistant["tool_calls"]] == [call.arguments, {}]
    assert second.messages[2] == {"role": "tool", "tool_call_id": "call_1_0", "content": "rain"}
    assert second.tools == [WEATHER]


def test_streamed_tool_calls_have_an_index_and_come_complete() -> None:
    events = (ToolCallEvent("a", "weather", {"city": "Oslo"}), ToolCallEvent("b", "weather", {}))
    chunks = create(played(Piece(events=(Start(7), *events, Done("tool_calls")))), stream=True, tools=[WEATHER])
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.id, call.function.name) for call in calls] == [(0, "a", "weather"), (1, "b", "weather")]
    assert calls[0].function.arguments == '{"city": "Oslo"}'


class City(pydantic.BaseModel):
    name: str
    rivers: list[str]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own, about what it sends back
def test_structured_output_and_what_the_client_parsed_comes_back() -> None:
    service = played(Piece(events=(Start(7), Text('{"name": "Bern", "rivers": ["Aare"]}'), Done("stop"))))

    async def action(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.parse(model="scripted", messages=USER, response_format=City)
        assert answer.choices[0].message.parsed == City(name="Bern", rivers=["Aare"])
        messages = [*USER, answer.choices[0].message, *USER]
        await client.chat.completions.parse(model="scripted", messages=messages, response_format=City)

    with_client(service, action)
    request = service.seen[0]
    assert request.output_format is not None and request.output_format.kind == "json_schema"
    assert request.output_format.definition["properties"]["rivers"]["items"] == {"type": "string"}
    assert isinstance(service.seen[1], ChatRequest) and service.seen[1].messages[1]["content"].startswith('{"name"')


def test_logprobs_of_every_token_also_where_a_character_is_incomplete() -> None:
    euro = "€".encode()
    service = played(
        Piece(events=(Start(7),), tokens=(SampledToken(token_id=euro[0], logprob=-0.5, top_logprobs=((65, -0.25),)),)),
        Piece(
            events=(Text("€A"),),
            tokens=(
                SampledToken(token_id=euro[1], logprob=float("-inf"), top_logprobs=()),
                SampledToken(token_id=65, logprob=-1.0, top_logprobs=((65, -1.0), (66, -2.0))),
            ),
        ),
        Piece(events=(Done("stop"),)),
    )
    content = create(service, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert service.seen[0].sampling["logprobs"] == 2
    assert [(token.token, token.bytes) for token in content] == [("\\xe2", [0xE2]), ("\\x82", [0x82]), ("A", [65])]
    assert [token.logprob for token in content] == [-0.5, -9999.0, -1.0]
    assert [[top.token for top in token.top_logprobs] for token in content] == [["A"], [], ["A", "B"]]
    chunks = create(service, logprobs=True, top_logprobs=2, stream=True)
    assert [len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices[0].logprobs] == [1, 2]


def test_choices_have_seeds_and_tool_call_ids_of_their_own() -> None:
    service = played(Piece(events=(Start(7), ToolCallEvent("call_0", "weather", {}))), Piece(events=(Done("stop"),)))
    answer = create(service, n=3, seed=2**63 - 2, tools=[WEATHER])
    assert [request.sampling["seed"] for request in service.seen] == [2**63 - 2, 2**63 - 1, 0]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 3
    assert answer.usage.prompt_tokens == 7 and answer.usage.prompt_tokens_details.cached_tokens == 3
    create(service, n=2)
    assert len({request.sampling["seed"] for request in service.seen[3:]}) == 2
    create(service)
    assert "seed" not in service.seen[-1].sampling


def test_choices_come_interleaved() -> None:
    """The second choice is sent while the first one waits for it to end."""

    class Slow(ScriptedReply):
        async def pieces(self) -> AsyncIterator[Piece]:
            yield HELLO[0]
            await other_has_ended.wait()
            for piece in HELLO[1:]:
                yield piece

    class Quick(ScriptedReply):
        async def pieces(self) -> AsyncIterator[Piece]:
            for piece in HELLO:
                yield piece
            other_has_ended.set()

    other_has_ended = asyncio.Event()
    service = played()
    replies = iter((Slow(()), Quick(())))
    service._reply = lambda request, tenant: next(replies)  # type: ignore[method-assign]
    chunks = create(service, n=2, stream=True)
    order = [chunk.choices[0].index for chunk in chunks]
    assert order == [0, 1, 1, 1, 0, 0]


def test_selection_comes_once_for_each_piece() -> None:
    service = played(
        Piece(events=(Start(7), Text("a"), Text("b")), selection=[1, 2]),
        Piece(events=(), selection=[3]),
        Piece(events=(Done("stop"),)),
    )
    whole = create(service, extra_body={"indexshare": {"selected": True}})
    assert service.seen[0].wants_selection and whole.indexshare == {"selected": [[1, 2], [3]]}
    chunks = create(service, stream=True, extra_body={"indexshare": {"selected": True}})
    selected = [(chunk.choices[0].delta.content, getattr(chunk, "indexshare", None)) for chunk in chunks]
    assert selected == [
        ("", None),
        ("a", {"selected": [1, 2]}),
        ("b", None),
        (None, {"selected": [3]}),
        (None, None),
    ]
    assert "n = 1" in refused(n=2, indexshare={"selected": True})["message"]
    assert not hasattr(create(played(*HELLO)), "indexshare")


# Streaming equals not streaming

tokens = st.lists(
    st.builds(
        SampledToken,
        token_id=st.integers(0, 255),
        logprob=st.floats(-20, 0),
        top_logprobs=st.lists(st.tuples(st.integers(0, 255), st.floats(-20, 0)), max_size=2).map(tuple),
    ),
    max_size=3,
).map(tuple)
events = st.lists(
    st.one_of(
        st.builds(Text, st.text(max_size=4)),
        st.builds(Reasoning, st.text(max_size=4)),
        st.builds(Warning, st.just("w")),
        st.builds(
            ToolCallEvent,
            st.uuids().map(str),
            st.sampled_from(["f", "g"]),
            st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2),
        ),
    ),
    max_size=3,
).map(tuple)
pieces = st.lists(st.builds(Piece, events=events, tokens=tokens), max_size=5)
endings = st.sampled_from([Done("stop"), Done("length"), Done("tool_calls")])


@given(script=st.lists(pieces, min_size=1, max_size=2), ending=endings, logprobs=st.booleans())
def test_streaming_equals_not_streaming(script: list[list[Piece]], ending: Done, logprobs: bool) -> None:
    scripts = [[Piece(events=(Start(7),)), *own, Piece(events=(ending,))] for own in script]

    async def action(client: openai.AsyncOpenAI) -> None:
        fields: dict[str, Any] = {"model": "scripted", "messages": USER, "n": len(scripts), "logprobs": logprobs}
        whole = await client.chat.completions.create(**fields)
        state = ChatCompletionStreamState()
        reasoning = [""] * len(scripts)
        options = {"include_usage": True}
        async for chunk in await client.chat.completions.create(**fields, stream=True, stream_options=options):
            if chunk.choices:
                reasoning[chunk.choices[0].index] += getattr(chunk.choices[0].delta, "reasoning_content", "")
            state.handle_chunk(chunk)
        streamed = state.current_completion_snapshot
        assert streamed.usage == whole.usage
        for index, choice in enumerate(whole.choices):
            twin = next(other for other in streamed.choices if other.index == index)
            assert (twin.message.content or None) == (choice.message.content or None)
            assert reasoning[index] == (getattr(choice.message, "reasoning_content", None) or "")
            assert twin.finish_reason == choice.finish_reason
            calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
            assert calls == [
                (call.id, call.function.name, call.function.arguments) for call in twin.message.tool_calls or ()
            ]
            assert (twin.logprobs.content if twin.logprobs else []) == (choice.logprobs.content if logprobs else [])

    numbers = iter(range(10**6))
    with_client(ScriptedService(lambda request: scripts[next(numbers) % len(scripts)]), action)


# The request


def test_sampling_fields_are_passed_on_and_only_those_given() -> None:
    assert asked().sampling == {}
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 2.0,
        "seed": 3,
        "stop": ["a", "b"],
    }
    assert asked(**given, top_k=-1, max_tokens=5).sampling == given | {"top_k": 0, "max_new_tokens": 5}
    assert asked(max_completion_tokens=6, max_tokens=6, stop="x").sampling == {"max_new_tokens": 6, "stop": "x"}
    assert asked(logprobs=True).sampling == {"logprobs": 0}
    assert refused(max_completion_tokens=6, max_tokens=5)["param"] == "max_completion_tokens"


NUMBERS = {
    # field: (a value that works, the sampling argument that it becomes)
    "temperature": (0.5, "temperature"),
    "top_p": (0.5, "top_p"),
    "top_k": (5, "top_k"),
    "min_p": (0.5, "min_p"),
    "repetition_penalty": (1.5, "repetition_penalty"),
    "presence_penalty": (0.5, "presence_penalty"),
    "frequency_penalty": (0.5, "frequency_penalty"),
    "seed": (5, "seed"),
    "max_tokens": (5, "max_new_tokens"),
    "max_completion_tokens": (5, "max_new_tokens"),
    "top_logprobs": (5, "logprobs"),
    "n": (2, None),
    "thinking.budget_tokens": (5, None),
}
IMPOSSIBLE = ["NaN", "Infinity", "1e400", "9223372036854775808", "true", '"1"', "[]"]
ODD = ["-1", "0", "1.5", "2147483648"]


@pytest.mark.parametrize("field", NUMBERS)
def test_odd_numbers_are_refused_or_understood_by_the_sampler(field: str) -> None:
    works, argument = NUMBERS[field]
    for value in [str(works), "null", *ODD, *IMPOSSIBLE]:
        outer, _, inner = field.partition(".")
        number = f'{{"type": "enabled", "{inner}": {value}}}' if inner else value
        service = played(*HELLO)
        response = post(
            service, f'{{"messages": [{{"role": "user", "content": "hi"}}], "logprobs": true, "{outer}": {number}}}'
        )
        if value not in ODD:
            assert response.status_code == (400 if value in IMPOSSIBLE else 200), value
        if response.status_code == 200:
            request = service.seen[0]
            SamplingParams(**request.sampling)  # what we let through, the sampler takes
            assert argument is None or value != str(works) or request.sampling[argument] == works
        else:
            assert response.status_code == 400, value
            if value not in ("NaN", "Infinity"):  # which are not JSON: no field is known yet
                assert outer in response.json()["error"]["param"], value


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"guided_json": {}}, "guided_json"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
        ({"stream_options": {"x": 1}}, "x"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"functions": [{"name": "f"}]}, "use tools"),
        ({"function_call": "auto"}, "use tool_choice"),
        ({"store": True}, "nothing is stored"),
        ({"modalities": ["audio"]}, "text"),
        ({"verbosity": "low"}, "medium"),
        ({"top_logprobs": 3}, "logprobs: true"),
        ({"top_logprobs": 21, "logprobs": True}, "20"),
        ({"n": 17}, "16"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 4097}, "4096"),
        ({"messages": [{"role": "owner", "content": "x"}]}, "messages[0]"),
        ({"messages": [*USER, {"role": "user"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "mood"),
        ({"tools": [WEATHER] * 513}, "512"),
        ({"tools": [{"type": "retrieval"}]}, "function"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "name"),
        ({"tool_choice": "any", "tools": [WEATHER]}, "required"),
        ({"tool_choice": "required"}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [WEATHER]}, "'f'"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}, "tools": [WEATHER]}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "not both"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"thinking": {"type": "maybe"}}, "enabled"),
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, "enable_thinking"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "16"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    assert words in refused(**fields)["message"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "image", "file"])
def test_media_are_refused_and_nothing_is_fetched(kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://169.254.169.254/latest"}}
    error = refused(messages=[{"role": "user", "content": [{"type": "text", "text": "look"}, part]}])
    assert "never fetched" in error["message"] and error["param"] == "messages[0].content"


def test_fields_that_change_nothing_are_accepted_and_null_is_absent() -> None:
    ignored = {
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "store": False,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "x"},
        "verbosity": "medium",
        "modalities": ["text"],
        "logit_bias": {},
    }
    nulls = dict.fromkeys(
        (
            "temperature",
            "stop",
            "tools",
            "tool_choice",
            "response_format",
            "max_tokens",
            "stream",
            "stream_options",
            "n",
        )
    )
    assert asked(**ignored, **nulls) == asked()


def test_messages_are_normalised() -> None:
    sent = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": None, "refusal": None, "reasoning": "because", "tool_calls": []},
        {"role": "user", "content": "go on", "name": "Ann"},
    ]
    assert asked(messages=sent).messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "reasoning_content": "because"},
        {"role": "user", "content": "go on", "name": "Ann"},
    ]


def test_tools_are_passed_on_without_nulls_and_in_one_order() -> None:
    tool = {"function": {"parameters": {"b": 1, "a": 2}, "description": None, "name": "f"}, "type": "function"}
    (seen,) = asked(tools=[tool]).tools
    assert json.dumps(seen) == '{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}'


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        ({"type": "function", "function": {"name": "weather"}}, ToolChoice(mode="required", name="weather")),
    ],
)
def test_tool_choice(choice: object, expected: ToolChoice) -> None:
    assert asked(tools=[WEATHER], tool_choice=choice).tool_choice == expected
    assert not asked(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False).tool_choice.parallel


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, OutputFormat(kind="json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            OutputFormat(kind="json_schema", definition=SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, OutputFormat(kind="json_schema", definition=SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, OutputFormat(kind="json_object")),
        ({"structured_outputs": {"regex": "a+"}}, OutputFormat(kind="regex", definition="a+")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, OutputFormat(kind="grammar", definition='start: "a"')),
        ({"structured_outputs": {"choice": ["a.b", "c"]}}, OutputFormat(kind="regex", definition=r"(?:a\.b|c)")),
    ],
)
def test_output_formats(fields: dict[str, Any], expected: OutputFormat | None) -> None:
    assert asked(**fields).output_format == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, None, None, None)),
        ({"reasoning_effort": "max"}, ("max", None, None, None)),
        ({"enable_thinking": False, "clear_thinking": False}, (None, False, None, False)),
        ({"thinking": {"type": "enabled", "budget_tokens": 9, "clear_thinking": False}}, (None, True, 9, False)),
        ({"thinking": {"type": "disabled", "budget_tokens": 9}}, (None, False, None, None)),
        (
            {"chat_template_kwargs": {"enable_thinking": True, "clear_thinking": True, "reasoning_effort": "high"}},
            ("high", True, None, True),
        ),
    ],
)
def test_thinking(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    request = asked(**fields)
    thinking = (request.reasoning_effort, request.enable_thinking, request.thinking_budget, request.clear_thinking)
    assert thinking == expected


def test_the_tenant_is_passed_on() -> None:
    service = played(*HELLO)
    app = application(service)

    async def with_key(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["tenant"] = "key-1"
        await app(scope, receive, send)

    async def run() -> None:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=with_key), base_url="http://x") as http:
            await http.post("/v1/chat/completions", json={"messages": USER})

    asyncio.run(run())
    assert service.tenants == ["key-1"]


# Errors


def raising(error: Exception) -> ScriptedService:
    def script(request: object) -> Sequence[Piece]:
        raise error

    return ScriptedService(script)


def test_errors_reach_the_client_as_its_exceptions() -> None:
    with pytest.raises(openai.NotFoundError, match="use one of scripted") as missing:
        create(played(*HELLO), model="gpt-6")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="too hot"):
        create(raising(RequestError("too hot")))
    with pytest.raises(openai.BadRequestError) as too_long:
        create(raising(MemoryLimitError("too long")))
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.RateLimitError) as busy:
        create(raising(OverloadedError("busy", retry_after=4.2)), stream=True)
    assert busy.value.response.headers["retry-after"] == "4"


@pytest.mark.parametrize(
    ("ending", "words"),
    [((Error("the model broke"),), "the model broke"), ((Done("cancelled"),), "cancelled"), ((), "broke off")],
)
def test_a_failure_in_the_middle(ending: tuple[Event, ...], words: str) -> None:
    script = (Piece(events=(Start(7),)), Piece(events=(Text("Hel"),)), Piece(events=(Text("lo"), *ending)))
    with pytest.raises(openai.InternalServerError, match=words):
        create(played(*script))
    received = []

    async def action(client: openai.AsyncOpenAI) -> None:
        async for chunk in await client.chat.completions.create(model="scripted", messages=USER, stream=True):
            received.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match=words):
        with_client(played(*script), action)
    assert received == ["", "Hel", "lo"]


def test_when_a_choice_is_not_accepted_the_others_are_cancelled() -> None:
    def script(request: object) -> Sequence[Piece]:
        if len(service.seen) == 3:
            raise OverloadedError("busy", retry_after=1)
        return HELLO

    service = ScriptedService(script)
    assert post(service, {"messages": USER, "n": 3}).status_code == 429
    assert [reply.closed for reply in service.replies] == [True, True]


class SilentReply(ScriptedReply):
    """One piece, then nothing until it is closed."""

    async def pieces(self) -> AsyncIterator[Piece]:
        try:
            yield HELLO[0]
            await asyncio.Event().wait()
        finally:
            self.closed = True


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_every_reply(stream: bool) -> None:
    service = played()
    replies = [SilentReply(()), SilentReply(())]
    waiting = iter(replies)
    service._reply = lambda request, tenant: next(waiting)  # type: ignore[method-assign]
    body = json.dumps({"messages": USER, "n": 2, "stream": stream}).encode()
    sent: list[AsgiMessage] = []

    async def run() -> None:
        is_gone = asyncio.Event()
        requests = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> AsgiMessage:
            if (message := next(requests, None)) is not None:
                return message
            if stream:
                await is_gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: AsgiMessage) -> None:
            sent.append(message)
            if b"assistant" in message.get("body", b""):
                is_gone.set()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [(b"content-type", b"application/json")],
        }
        await application(service)(scope, receive, send)

    asyncio.run(run())
    assert all(reply.closed for reply in replies)
    assert any(b"assistant" in message.get("body", b"") for message in sent) == stream
