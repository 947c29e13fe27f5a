"""A streamed reply is the reply that is not streamed, in both dialects that are made of blocks."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pydantic
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from server.dialects import MODEL, USAGE, post, read_events
from server.scripted import ScriptedService

from indexshare.chat.types import Done, Error, Event, Reasoning, Start, Text, ToolCallEvent, Warning
from indexshare.server import messages, responses
from indexshare.server.blocks import decode_block
from indexshare.server.http import ApiError
from indexshare.server.messages_types import BLOCKS
from indexshare.server.types import Piece

texts = st.text(alphabet="a\n \u2028é\U0001f642", max_size=4)
values = st.one_of(st.integers(), texts, st.booleans(), st.none(), st.lists(st.integers(), max_size=2))
calls = st.builds(ToolCallEvent, st.just("call"), st.just("f"), st.dictionaries(texts, values, max_size=2))
events = st.lists(st.one_of(texts.map(Text), texts.map(Reasoning), calls, st.just(Warning("?"))), max_size=8)
ends = st.sampled_from([Done(reason, USAGE) for reason in ("stop", "length", "tool_calls")] + [Error("broken")])


@st.composite
def replies(draw: st.DrawFn) -> list[Piece]:
    """Start, events and an end, cut into pieces anywhere, some of which bring nothing but a selection."""
    sequence: list[Event] = [Start(7), *draw(events), draw(ends)]
    cuts = sorted(draw(st.lists(st.integers(0, len(sequence) - 1), max_size=6)))
    bounds = zip([0, *cuts], [*cuts, len(sequence)], strict=True)
    selections = st.one_of(st.none(), st.integers())
    return [Piece(events=tuple(sequence[begin:end]), selection=draw(selections)) for begin, end in bounds]


def both(dialect: Any, path: str, pieces: Sequence[Piece], body: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The reply at once, None if it fails, and the events of its stream."""

    async def run() -> tuple[Any, list[dict[str, Any]]]:
        service = ScriptedService(lambda request: pieces)
        whole = await post(dialect.routes, service, path, {"model": MODEL, **body})
        stream = await post(dialect.routes, service, path, {"model": MODEL, "stream": True, **body})
        return whole.json() if whole.status_code == 200 else None, read_events(stream.text)

    return asyncio.run(run())


def said(pieces: Sequence[Piece]) -> tuple[str, str, int]:
    """All text without white space, all reasoning, and the number of calls."""
    flat = [event for piece in pieces for event in piece.events]
    text = "".join(event.text for event in flat if isinstance(event, Text))
    reasoning = "".join(event.text for event in flat if isinstance(event, Reasoning))
    return "".join(text.split()), reasoning, sum(isinstance(event, ToolCallEvent) for event in flat)


def selections_of(pieces: Sequence[Piece]) -> Any:
    chosen = [piece.selection for piece in pieces if piece.selection is not None]
    return {"selected": chosen} if chosen else None


@given(replies())
def test_messages(pieces: list[Piece]) -> None:
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}
    whole, stream = both(messages, "/v1/messages", pieces, body)
    failed = isinstance(pieces[-1].events[-1], Error)
    assert (whole is None) == failed
    assert [e["indexshare"]["selected"] for e in stream if "indexshare" in e] == [
        piece.selection for piece in pieces if piece.selection is not None
    ]
    stream = [event for event in stream if event["type"] != "ping"]
    assert stream[-1]["type"] == ("error" if failed else "message_stop")
    assert stream[0]["type"] == "message_start"
    if failed:
        return
    parser: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(RawMessageStreamEvent)
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in stream:
        parsed = parser.validate_python(event)
        snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    final = snapshot.to_dict()
    Message.model_validate(whole)
    for key in ("content", "stop_reason", "usage", "role", "type", "model"):
        assert json.loads(json.dumps(final[key])) == whole[key]
    assert whole.get("indexshare") == selections_of(pieces)
    text, reasoning, num_calls = said(pieces)
    blocks = whole["content"]
    assert "".join("".join(b["text"].split()) for b in blocks if b["type"] == "text") == text
    assert "".join(b["thinking"] for b in blocks if b["type"] == "thinking") == reasoning
    assert sum(b["type"] == "tool_use" for b in blocks) == num_calls
    assert all(b["text"].strip() for b in blocks if b["type"] == "text")
    assert all(b["signature"] for b in blocks if b["type"] == "thinking")
    assert (whole["stop_reason"] == "tool_use") == (num_calls > 0 and pieces[-1].events[-1] != Done("length", USAGE))


@given(replies())
def test_responses(pieces: list[Piece]) -> None:
    whole, stream = both(responses, "/v1/responses", pieces, {"input": "Hello"})
    failed = isinstance(pieces[-1].events[-1], Error)
    assert (whole is None) == failed
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert [e["indexshare"]["selected"] for e in stream if "indexshare" in e] == [
        piece.selection for piece in pieces if piece.selection is not None
    ]
    stream = [event for event in stream if event["type"] != "response.indexshare"]
    parser: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
    grown: dict[str, str] = {}
    for event in stream:
        assert parser.validate_python(event).type == event["type"]
        if event["type"].endswith(".delta"):
            grown[event["item_id"]] = grown.get(event["item_id"], "") + event["delta"]
    final = stream[-1]["response"]
    assert [event["item"] for event in stream if event["type"] == "response.output_item.done"] == final["output"]
    for item in final["output"]:
        content = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert content == grown[item["id"]]
    if failed:
        assert stream[-1]["type"] == "response.failed"
        return
    Response.model_validate(whole)

    def without_ids(response: Any) -> Any:
        times_and_ids = {"id": "", "created_at": 0, "completed_at": 0, "indexshare": None}
        return {**response, **times_and_ids, "output": [{**item, "id": ""} for item in response["output"]]}

    assert without_ids(whole) == without_ids(final)
    assert whole.get("indexshare") == selections_of(pieces)
    text, reasoning, num_calls = said(pieces)
    items = whole["output"]
    assert "".join("".join(i["content"][0]["text"].split()) for i in items if i["type"] == "message") == text
    assert "".join(i["content"][0]["text"] for i in items if i["type"] == "reasoning") == reasoning
    assert sum(i["type"] == "function_call" for i in items) == num_calls


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "image"}, "at: type 'image' is not supported; say it in text"),
        ({"type": None}, "at: type None is not supported; say it in text"),
        ({"type": {}}, "at: type {} is not supported; say it in text"),
        ({"text": "a"}, "at: type None is not supported; say it in text"),
        ({"type": "text", "text": None}, "at: Expected `str`, got `null` - at `$.text`"),
        ({"type": "text"}, "at: Object missing required field `text`"),
    ],
)
def test_a_block_that_cannot_be_read(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode_block(value, BLOCKS["user"], "at", "say it in text")
    assert (caught.value.status, caught.value.message, caught.value.param) == (400, message, "at")
