"""What is fuzzed: each target takes bytes and raises when something is wrong. `run.py` runs them."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fuzz.asgi import post
from server.scripted import ScriptedReply, ScriptedService
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from indexshare.chat.parser import EventParser
from indexshare.chat.types import Done, Event, Reasoning, Start, Text, ToolCallEvent, Usage, merge_events
from indexshare.engine.engine import EngineOptions
from indexshare.engine.grammar import GuideCompiler
from indexshare.engine.llm import LLM, load
from indexshare.errors import RequestError
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.security import CheckHostAndOrigin
from indexshare.server.service import EngineService
from indexshare.server.types import Piece

T = TypeVar("T")

COMPILE_SECONDS = 2.0  # of CPU
USAGE = Usage(num_prompt_tokens=7, num_completion_tokens=5)
HELLO = [{"role": "user", "content": "hello"}]
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
SEPARATOR = "\x1e"  # cuts inputs that are lists of texts

LOOP = asyncio.new_event_loop()


class PreparedService(EngineService):
    """The real service up to the engine: requests are read, rendered and compiled, and a script answers."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(lambda: llm, EngineOptions(), model_names=("nano",))
        self._llm = llm
        self._compiler = GuideCompiler(llm.tokenizer, llm.config.vocab_size)
        self.context_length, self._not_ready = llm.config.max_position_embeddings, None

    async def _prepare(self, work: Callable[[], T]) -> T:
        return work()

    def _submit(self, *arguments: object) -> Any:
        return ScriptedReply([Piece(events=(Start(7), Text("hello"), Done("stop", USAGE)))])


@cache
def nano() -> LLM:
    return load("nano", device="cpu", threads=1)


@cache
def prepared_app() -> Starlette:
    logging.getLogger("indexshare").setLevel(logging.ERROR)
    return create_app(PreparedService(nano()), ServerSettings())  # type: ignore[arg-type]


def requests(data: bytes) -> None:
    """A path and a body: an answer below 500, and an error that is JSON."""
    path = PATHS[data[0] % len(PATHS)] if data else PATHS[0]
    status, answer = post(LOOP, prepared_app(), path, data[1:])
    assert status < 500, (path, status)
    if status >= 400:
        assert json.loads(answer)["error"]["message"], path


def parser(data: bytes) -> None:
    """Texts as a model might write them, in pieces: the events do not depend on the cuts, and nothing is lost."""
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "object"}}}}]
    thinking, pieces = bool(data[:1] > b"\x7f"), data[1:].decode("utf-8", "replace").split(SEPARATOR)
    found = []
    for cut in (pieces, ["".join(pieces)], list("".join(pieces))):
        reader = EventParser(tools, thinking=thinking)
        events = [event for piece in cut for event in reader.feed(piece)]
        found.append(merge_events([*events, *reader.finish("stop")]))
    assert found[0] == found[1] == found[2]
    assert isinstance(found[0][-1], Done)
    assert _accounts_for("".join(_raw(event) for event in found[0]), "".join(pieces))


def _accounts_for(kept: str, text: str) -> bool:
    """Whether `kept` is `text`, perhaps without some of its <think> and </think>, which nothing else may be."""
    reached = {0}
    for part in re.split("(</?think>)", text):
        after = {position + len(part) for position in reached if kept.startswith(part, position)}
        reached = after | reached if part in ("<think>", "</think>") else after
    return len(kept) in reached


def _raw(event: Event) -> str:
    if isinstance(event, ToolCallEvent):
        return event.raw
    return event.text if isinstance(event, Text | Reasoning) else ""


def replies(data: bytes) -> None:
    """Any texts that a model could say: each dialect sends them whole, in events that are framed as they must be."""
    kinds: Sequence[Callable[[str], Event]] = (Text, Reasoning, _call)
    texts = data.decode("utf-8", "replace").split(SEPARATOR)
    events = [kinds[ord(text[0]) % 3](text[1:]) for text in texts if text]
    if any(isinstance(event, ToolCallEvent) for event in events):  # a reply reasons first and calls last
        events.sort(key=lambda event: (Reasoning, Text, ToolCallEvent).index(type(event)))  # type: ignore[arg-type]
    pieces = [
        Piece(events=(Start(7),)),
        *[Piece(events=(event,)) for event in events],
        Piece(events=(Done("stop", USAGE),)),
    ]
    app = create_app(ScriptedService(lambda request: pieces, model_names=("nano",)), ServerSettings())
    spoken = "".join(event.text for event in events if isinstance(event, Text))
    for path, body, text_of in DIALECTS:
        status, answer = post(LOOP, app, path, json.dumps({**body, "stream": True}).encode())
        assert status == 200, path
        heard = "".join(text_of(chunk) for chunk in sse_chunks(answer))
        # The dialects of blocks leave out text that is only white space between other blocks.
        assert heard == spoken if path.startswith("/v1/c") else "".join(heard.split()) == "".join(spoken.split()), path


def _call(text: str) -> ToolCallEvent:
    return ToolCallEvent("call_1", "f", {"a": text})


def sse_chunks(body: bytes) -> list[dict[str, Any]]:
    """The objects of a stream, read as the standard says: blocks, each of a data line and perhaps an event line."""
    chunks = []
    text = body.decode()
    assert text.endswith("\n\n")
    for block in text.removesuffix("\n\n").split("\n\n"):
        names = [line.partition(": ")[0] for line in block.split("\n")]
        assert names in (["data"], ["event", "data"]), block
        data = block.split("\n")[-1].removeprefix("data: ")
        if data != "[DONE]":
            chunks.append(json.loads(data))
    return chunks


def _openai_text(chunk: Mapping[str, Any]) -> str:
    return "".join(choice["delta"].get("content", "") for choice in chunk["choices"])


DIALECTS: Sequence[tuple[str, dict[str, Any], Callable[[Mapping[str, Any]], str]]] = (
    ("/v1/chat/completions", {"messages": HELLO}, _openai_text),
    (
        "/v1/messages",
        {"model": "nano", "max_tokens": 9, "messages": HELLO},
        lambda chunk: chunk["delta"].get("text", "") if chunk["type"] == "content_block_delta" else "",
    ),
    (
        "/v1/responses",
        {"model": "nano", "input": "hello"},
        lambda chunk: chunk["delta"] if chunk["type"] == "response.output_text.delta" else "",
    ),
)


@cache
def compiler() -> GuideCompiler:
    return GuideCompiler(nano().tokenizer, nano().config.vocab_size)


def guides(data: bytes) -> None:
    """A schema, a pattern, a grammar or tools: compiled or refused, in bounded time."""
    kind, text = data[:1], data[1:].decode("utf-8", "replace")
    started = time.process_time()
    try:
        match kind[0] % 4 if kind else 0:
            case 0:
                compiler().regex(text)
            case 1:
                compiler().grammar(text)
            case 2:
                compiler().json_schema(json.loads(text))
            case _:
                tool = {"type": "function", "function": {"name": "f", "parameters": json.loads(text)}}
                compiler().tool_calls([tool], required=True)
    except RequestError:
        pass
    except (ValueError, RecursionError):  # only from json.loads: what is no JSON never comes so far
        assert not _is_json(text)
    assert time.process_time() - started < COMPILE_SECONDS


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


async def _accept(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def hosts(data: bytes) -> None:
    """Host and Origin headers: only names of this machine and those that are allowed pass."""

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await checked({**scope, "state": {"request_id": "x"}}, receive, send)

    checked: ASGIApp = CheckHostAndOrigin(
        _accept, allowed_hosts=["example.org"], allowed_origins=["https://example.com"]
    )
    host, _, origin = data.partition(b"\n")
    headers = [(b"host", host), *([(b"origin", origin)] if origin else [])]
    status, _ = post(LOOP, with_state, "/v1/models", b"", headers)
    assert status in (200, 400, 403)
    if status == 200:
        name = host.decode("ascii").lower()
        known = ("127.", "localhost", "[", "example.org")
        assert name.startswith(known), name
        assert not origin or origin in (b"https://example.com", b"http://" + host)


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "requests": requests,
    "parser": parser,
    "replies": replies,
    "guides": guides,
    "hosts": hosts,
}


def seeds(name: str) -> list[bytes]:
    """Inputs to start from."""
    return {"requests": _request_seeds, "guides": _guide_seeds}.get(name, lambda: _SEEDS[name])()


def _request_seeds() -> list[bytes]:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "1"}]
    use = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    blocks = [*HELLO, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": "y"}, use]}]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "1"}]}
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    own = {"name": "f", "input_schema": {"type": "object"}}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}], "summary": []},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ]
    bodies: list[tuple[int, dict[str, Any]]] = [
        (0, {"model": "nano", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}),
        (0, {"messages": turns, "tools": [tool], "tool_choice": "required", "n": 2, "seed": 1, "logprobs": True}),
        (0, {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
        (0, {"messages": HELLO, "structured_outputs": {"regex": "a+"}, "thinking": {"type": "enabled"}}),
        (1, {"prompt": ["a", "b"], "max_tokens": 0, "echo": True, "logprobs": 1, "stop": ["x"], "top_p": 0.5}),
        (1, {"prompt": [1, 2, 3], "temperature": 1.0, "structured_outputs": {"choice": ["a", "b"]}}),
        (
            2,
            {"model": "nano", "input": items, "tools": [{"type": "function", "name": "f"}], "text": {"format": schema}},
        ),
        (2, {"model": "nano", "input": "x", "reasoning": {"effort": "high"}, "tool_choice": "auto", "stream": True}),
        (3, {"model": "nano", "max_tokens": 9, "messages": [*blocks, result], "tools": [own], "system": "x"}),
        (
            3,
            {"model": "nano", "max_tokens": 99, "messages": HELLO, "thinking": {"type": "enabled", "budget_tokens": 9}},
        ),
        (4, {"model": "nano", "messages": HELLO, "output_config": {"effort": "low", "format": schema}}),
        (5, {"messages": HELLO, "tools": [tool]}),
        (6, {"tokens": [1, 2, 3]}),
    ]
    return [bytes([index]) + json.dumps(body).encode() for index, body in bodies]


def _guide_seeds() -> list[bytes]:
    schemas = [
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"enum": [1, "a", None]}}, "maxItems": 9},
        {"anyOf": [{"type": "string", "pattern": "^a+$", "maxLength": 5}, {"type": "number", "multipleOf": 0.5}]},
        {"type": "string", "format": "date-time"},
    ]
    texts = [
        (b"\x00", rb"(a|b)*c{2,5}[^d]\d+"),
        (b"\x01", b'start: "a" b+\nb: /[0-9]+/ | start'),
        (b"\x01", b'root ::= "a"'),
    ]
    return [kind + text for kind, text in texts] + [
        kind + json.dumps(schema).encode() for schema in schemas for kind in (b"\x02", b"\x03")
    ]


_SEEDS: dict[str, list[bytes]] = {
    "parser": [
        b"\x00text <tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call> more",
        b"\xffthinking\x1e</th\x1eink>answer<tool_call>g</tool_call><tool_call>f<arg_key>b</arg_key>",
        b"\x00<think>x</think>y<arg_value></arg_value>",
    ],
    "replies": ["aplain\x1ebthinking\x1ec{}\x1ea\n\ndata: [DONE]\n\n\r\n\u2028".encode()],
    "hosts": [b"127.0.0.1:8000", b"localhost\nhttp://localhost", b"[::1]:1", b"example.org\nhttps://example.com"],
}


def dictionary() -> list[str]:
    """Words that mean something in any of the inputs: field names, tags, types."""
    from indexshare.server import messages_types, openai_types, responses_types, tokens

    words = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", SEPARATOR}
    words |= {"text", "thinking", "tool_use", "tool_result", "function", "json_schema", "null", "true", "1e999", "$ref"}
    for module in (messages_types, openai_types, responses_types, tokens):
        for kind in vars(module).values():
            words |= set(getattr(kind, "__struct_fields__", ()))
    return sorted(words)


def root() -> Path:
    """The folder that holds the package `fuzz`."""
    return Path(__file__).parents[1]
