"""The chat endpoint, driven by OpenAI's own client in process; the model is a script."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from server.dialects import StuckService, leave_when_stuck
from server.openai_client import CHAT, HELLO, USER, WEATHER, chat, played, post, routes, with_client
from server.scripted import ScriptedReply, ScriptedService

from indexshare.chat.types import Done, Error, Event, Reasoning, Start, Text, ToolCallEvent, Usage, Warning
from indexshare.engine.sampler import SampledToken
from indexshare.errors import MemoryLimitError, OverloadedError, RequestError
from indexshare.server.types import ChatRequest, Piece


def test_a_whole_answer() -> None:
    service = played(
        Piece(events=(Start(7),), tokens=()),
        Piece(events=(Reasoning("Hm"),), tokens=(SampledToken(token_id=1), SampledToken(token_id=2))),
        Piece(events=(), tokens=(SampledToken(token_id=3),)),
        Piece(events=(Text("He"), Warning("repaired")), tokens=(SampledToken(token_id=4),)),
        Piece(events=(Text("llo"),), tokens=(SampledToken(token_id=5),)),
        Piece(events=(Done("stop", Usage(num_prompt_tokens=7, num_completion_tokens=6, num_reasoning_tokens=3)),)),
    )
    answer = chat(service)
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
    chunks = chat(service, stream=True, stream_options={"include_usage": True})
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
    text = post(played(*HELLO), CHAT, {"messages": USER, "stream": True}).text
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
    chunks = chat(played(Piece(events=(Start(7), *events, Done("tool_calls")))), stream=True, tools=[WEATHER])
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
    content = chat(service, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert service.seen[0].sampling["logprobs"] == 2
    assert [(token.token, token.bytes) for token in content] == [("\\xe2", [0xE2]), ("\\x82", [0x82]), ("A", [65])]
    assert [token.logprob for token in content] == [-0.5, -9999.0, -1.0]
    assert [[top.token for top in token.top_logprobs] for token in content] == [["A"], [], ["A", "B"]]
    chunks = chat(service, logprobs=True, top_logprobs=2, stream=True)
    assert [len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices[0].logprobs] == [1, 2]


def test_choices_have_seeds_and_tool_call_ids_of_their_own() -> None:
    service = played(Piece(events=(Start(7), ToolCallEvent("call_0", "weather", {}))), Piece(events=(Done("stop"),)))
    answer = chat(service, n=3, seed=2**63 - 2, tools=[WEATHER])
    assert [request.sampling["seed"] for request in service.seen] == [2**63 - 2, 2**63 - 1, 0]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 3
    assert answer.usage.prompt_tokens == 7 and answer.usage.prompt_tokens_details.cached_tokens == 3
    chat(service, n=2)
    assert all("seed" not in request.sampling for request in service.seen[3:])  # the service draws them


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
    chunks = chat(service, n=2, stream=True)
    order = [chunk.choices[0].index for chunk in chunks]
    assert order == [0, 1, 1, 1, 0, 0]


def test_selection_comes_once_for_each_piece() -> None:
    service = played(
        Piece(events=(Start(7), Text("a"), Text("b")), selection=[1, 2]),
        Piece(events=(), selection=[3]),
        Piece(events=(Done("stop"),)),
    )
    whole = chat(service, extra_body={"indexshare": {"selected": True}})
    assert service.seen[0].wants_selection and whole.indexshare == {"selected": [[1, 2], [3]]}
    chunks = chat(service, stream=True, extra_body={"indexshare": {"selected": True}})
    selected = [(chunk.choices[0].delta.content, getattr(chunk, "indexshare", None)) for chunk in chunks]
    assert selected == [
        ("", None),
        ("a", {"selected": [1, 2]}),
        ("b", None),
        (None, {"selected": [3]}),
        (None, None),
    ]
    assert not hasattr(chat(played(*HELLO)), "indexshare")


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


# Errors


def raising(error: Exception) -> ScriptedService:
    def script(request: object) -> Sequence[Piece]:
        raise error

    return ScriptedService(script)


def test_errors_reach_the_client_as_its_exceptions() -> None:
    with pytest.raises(openai.NotFoundError, match="use one of scripted") as missing:
        chat(played(*HELLO), model="gpt-6")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="too hot"):
        chat(raising(RequestError("too hot")))
    with pytest.raises(openai.BadRequestError) as too_long:
        chat(raising(MemoryLimitError("too long")))
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.RateLimitError) as busy:
        chat(raising(OverloadedError("busy", retry_after=4.2)), stream=True)
    assert busy.value.response.headers["retry-after"] == "4"


@pytest.mark.parametrize(
    ("ending", "words"),
    [((Error("the model broke"),), "the model broke"), ((Done("cancelled"),), "cancelled"), ((), "broke off")],
)
def test_a_failure_in_the_middle(ending: tuple[Event, ...], words: str) -> None:
    script = (Piece(events=(Start(7),)), Piece(events=(Text("Hel"),)), Piece(events=(Text("lo"), *ending)))
    with pytest.raises(openai.InternalServerError, match=words):
        chat(played(*script))
    received = []

    async def action(client: openai.AsyncOpenAI) -> None:
        async for chunk in await client.chat.completions.create(model="scripted", messages=USER, stream=True):
            received.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match=words):
        with_client(played(*script), action)
    assert received == ["", "Hel", "lo"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_closes_what_was_not_read(stream: bool) -> None:
    """Also where the iterator is still held elsewhere, so that nothing else would close it."""
    held = []

    class Held(ScriptedReply):
        def pieces(self) -> AsyncIterator[Piece]:
            held.append(super().pieces())
            return held[0]

    service = played()
    reply = Held((Piece(events=(Start(7),)), Piece(events=(Error("broken"),)), *HELLO))
    service._reply = lambda request, tenant: reply  # type: ignore[method-assign]

    async def action(client: openai.AsyncOpenAI) -> None:
        await client._client.post("/v1/chat/completions", json={"messages": USER, "stream": stream})
        assert reply.closed

    with_client(service, action)


def test_an_exception_in_the_middle_of_a_stream_is_an_error_event() -> None:
    class Failing(ScriptedReply):
        async def pieces(self) -> AsyncIterator[Piece]:
            yield HELLO[0]
            raise MemoryLimitError("no room for 3 GB")

    service = played()
    service._reply = lambda request, tenant: Failing(())  # type: ignore[method-assign]
    with pytest.raises(openai.APIError, match="no room for 3 GB"):
        chat(service, stream=True)


def test_when_a_choice_is_not_accepted_the_others_are_cancelled() -> None:
    def script(request: object) -> Sequence[Piece]:
        if len(service.seen) == 3:
            raise OverloadedError("busy", retry_after=1)
        return HELLO

    service = ScriptedService(script)
    assert post(service, CHAT, {"messages": USER, "n": 3}).status_code == 429
    assert [reply.closed for reply in service.replies] == [True, True]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_every_reply(stream: bool) -> None:
    service = StuckService(lambda request: HELLO[:2])
    body = {"messages": USER, "n": 2, "stream": stream}
    sent = b"".join(asyncio.run(leave_when_stuck(routes, service, CHAT, body)))
    assert [reply.closed for reply in service.replies] == [True, True]
    assert (b"Hello" in sent) == stream
