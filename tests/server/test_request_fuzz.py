"""Request bodies with anything that a client could put into a field: an answer, or a 4xx that says why, never a 5xx.

`make fuzz` looks further, with the real template, grammars and tokenizer (tests/fuzz).
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fuzz.asgi import post
from hypothesis import example, given
from hypothesis import strategies as st
from server.dialects import reply_of
from server.scripted import ScriptedService
from starlette.applications import Starlette

from indexshare.chat.types import Reasoning, Text, ToolCallEvent
from indexshare.server import messages_types, openai_types, responses_types, tokens
from indexshare.server.app import ServerSettings, create_app

HELLO = [{"role": "user", "content": "hello"}]
# The smallest body of each endpoint, and the fields that it may have.
ENDPOINTS: dict[str, tuple[dict[str, Any], type[msgspec.Struct]]] = {
    "/v1/chat/completions": ({"messages": HELLO}, openai_types.ChatBody),
    "/v1/completions": ({"prompt": "hello"}, openai_types.CompletionBody),
    "/v1/responses": ({"model": "nano", "input": "hello"}, responses_types.ResponsesRequest),
    "/v1/messages": ({"model": "nano", "max_tokens": 9, "messages": HELLO}, messages_types.MessagesRequest),
    "/v1/messages/count_tokens": ({"model": "nano", "messages": HELLO}, messages_types.CountTokensRequest),
    "/tokenize": ({"prompt": "hello"}, tokens.TokenizeBody),
    "/detokenize": ({"tokens": [1]}, tokens.DetokenizeBody),
}
FIELDS = sorted(
    {
        field.encode_name
        for module in (messages_types, openai_types, responses_types, tokens)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
        for field in msgspec.structs.fields(kind)
    }
)
WORDS = (
    "user assistant system developer tool text thinking redacted_thinking tool_use tool_result tool_reference image "
    "function function_call function_call_output reasoning message input_text output_text reasoning_text namespace "
    "custom enabled disabled adaptive auto none any required json_object json_schema regex grammar low high max "
    "minimal nano {} []"
).split()

LEAVES = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from([None, True, False, 0, 1, -1, 0.5, 2**31, 2**63, 2**64, 1e308, -0.0]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), inner, max_size=5),
    ),
    max_leaves=12,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A path and a body: a valid one with some of the endpoint's own fields replaced by anything."""
    path = draw(st.sampled_from(sorted(ENDPOINTS)))
    smallest, kind = ENDPOINTS[path]
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    changes = draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    return path, {**smallest, **changes}


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Messages and items whose blocks have known types and any fields."""
    path = draw(st.sampled_from(["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]))
    block = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4).flatmap(
        lambda fields: st.sampled_from(WORDS).map(lambda kind: {**fields, "type": kind})
    )
    content = st.one_of(st.text(max_size=9), st.lists(block, max_size=3))
    message = st.builds(
        lambda role, content, extra: {**extra, "role": role, "content": content},
        st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
        content,
        st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=1),
    )
    key = "input" if path == "/v1/responses" else "messages"
    turns = draw(st.lists(st.one_of(message, block) if key == "input" else message, min_size=1, max_size=4))
    return path, {**ENDPOINTS[path][0], key: [*turns, *HELLO], "stream": draw(st.booleans())}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def app() -> Starlette:
    reply = reply_of(Reasoning("hm"), Text("hello"), ToolCallEvent("call_1", "f", {"a": 1}), reason="tool_calls")
    return create_app(ScriptedService(lambda request: reply, model_names=("nano",)), ServerSettings())


@given(st.one_of(bodies(), conversations()))
@example(("/v1/chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}))
def test_no_body_is_an_internal_error(
    loop: asyncio.AbstractEventLoop, app: Starlette, request: tuple[str, dict[str, Any]]
) -> None:
    path, body = request
    status, answer = post(loop, app, path, json.dumps(body).encode())
    assert status < 500, body
    if status >= 400:
        error = json.loads(answer)["error"]
        assert error["message"] and error["type"], body


@given(st.binary(max_size=200), st.sampled_from(sorted(ENDPOINTS)))
def test_what_is_no_json_is_refused(loop: asyncio.AbstractEventLoop, app: Starlette, body: bytes, path: str) -> None:
    status, answer = post(loop, app, path, body)
    assert 400 <= status < 500 or json.loads(body)
    assert json.loads(answer)
