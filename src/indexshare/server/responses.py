"""OpenAI's Responses API: POST /v1/responses, as the openai client and Codex use it.

Nothing is stored. `store` is accepted, true as well, and the reply says false; previous_response_id, conversation,
prompt, background and item references are refused with 400: send the whole conversation. Earlier reasoning items go
into the prompt by their `content`, and all of them do unless reasoning.context is "current_turn".

Codex offers tools that OpenAI runs (web_search, image_generation, tool_search) to servers that have none. Beside
functions these are left out: the model never hears of them, and `tools` of the reply lists what it was offered.
Alone, they are refused with 400, and so is any other type of tool (custom, local_shell, file_search, ...). The
functions of a `namespace` get names of the form NAMESPACE__NAME in the prompt, and their own names in the reply.

Accepted and ignored, because nothing here changes with them: metadata (sent back), user, safety_identifier,
prompt_cache_key, prompt_cache_options, prompt_cache_retention (prefixes are always reused), service_tier,
client_metadata, stream_options (nothing is obfuscated), max_tool_calls (limits tools that OpenAI runs), truncation (a
prompt that is too long is an error either way), include (the reasoning itself is in the reply, never encrypted),
reasoning.summary and generate_summary (there are none), text.verbosity; of tools defer_loading (all are offered at
once), allowed_callers and output_schema. Log-probabilities are refused: /v1/chat/completions has them.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.chat.types import FinishReason, ToolCallEvent, Usage
from indexshare.server.blocks import BlockFold, BlockKind, Chunk, decode_block, respond
from indexshare.server.http import ApiError, documented, read_json
from indexshare.server.responses_types import (
    ITEMS,
    REASONING_PARTS,
    TEXT_PARTS,
    TOOLS,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionChoice,
    FunctionTool,
    JsonObject,
    JsonSchema,
    MessageItem,
    NamespaceTool,
    ReasoningItem,
    ResponsesRequest,
)
from indexshare.server.types import ChatRequest, OutputFormat, Reply, Service, ToolChoice

_RUN_BY_OPENAI = ("web_search", "image_generation", "tool_search")
_TEXT_ONLY = "this is a text model: parts are input_text or output_text"
_TURN_ORDER = ("reasoning_content", "content", "tool_calls")


def routes(service: Service) -> list[Route]:
    """The route of this dialect."""

    @documented(summary="One reply, or its events", body=ResponsesRequest, stream=True)
    async def create(http: Request) -> Response:
        request = await read_json(http, ResponsesRequest)
        tools = _offered(request.tools or ())
        reply = await service.chat(_chat_request(request, tools, service), tenant=getattr(http.state, "tenant", ""))
        return await respond(http, reply, ResponseFold(request, tools, reply), stream=bool(request.stream))

    return [Route("/v1/responses", create, methods=["POST"])]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tool:
    """A function that the model is offered, as `prompt_name`. namespace: None for a function outside of any."""

    prompt_name: str
    namespace: str | None
    function: FunctionTool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tools:
    """What the model is offered. wire: the client's own tool objects; by_name: under their names in the prompt."""

    wire: Sequence[dict[str, Any]]
    by_name: Mapping[str, _Tool]


def _offered(values: Sequence[dict[str, Any]]) -> _Tools:
    """Raises ApiError 400 for tools that cannot be offered."""
    hint = "declare functions, which the client runs"
    kept = {index: value for index, value in enumerate(values) if value.get("type") not in _RUN_BY_OPENAI}
    if values and not kept:
        raise ApiError(400, f"tools[0]: type {values[0]['type']!r} is not available here; {hint}", param="tools")
    by_name: dict[str, _Tool] = {}
    for index, value in kept.items():
        tool = decode_block(value, TOOLS, f"tools[{index}]", hint)
        members = [(None, tool)] if isinstance(tool, FunctionTool) else list(_members(tool, f"tools[{index}]", hint))
        for namespace, function in members:
            name = _prompt_name(namespace, function.name)
            if name in by_name:
                raise ApiError(400, f"tools[{index}]: there are two tools named {name!r:.200}", param="tools")
            by_name[name] = _Tool(prompt_name=name, namespace=namespace, function=function)
    return _Tools(wire=list(kept.values()), by_name=by_name)


def _members(tool: NamespaceTool, where: str, hint: str) -> Iterator[tuple[str, FunctionTool]]:
    for index, value in enumerate(tool.tools):
        yield tool.name, decode_block(value, {"function": FunctionTool}, f"{where}.tools[{index}]", hint)


def _prompt_name(namespace: str | None, name: str) -> str:
    return name if namespace is None else f"{namespace}__{name}"


def _chat_request(request: ResponsesRequest, tools: _Tools, service: Service) -> ChatRequest:
    """The neutral request. Raises ApiError 400 for what cannot be served, 404 for another model."""
    if request.model not in service.model_names:
        message = f"there is no model {request.model!r:.200}; use {service.model_names[0]!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if request.previous_response_id is not None:
        message = "previous_response_id: nothing is stored here; send the whole conversation as input"
        raise ApiError(400, message, param="previous_response_id")
    if "message.output_text.logprobs" in (request.include or ()):
        raise ApiError(400, "include: log-probabilities are not available here", param="include")
    system = [{"role": "system", "content": request.instructions}] if request.instructions else []
    sampling = {
        "max_new_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
    }
    reasoning = request.reasoning
    return ChatRequest(
        messages=[*system, *_messages(request.input)],
        tools=[_chat_tool(tool) for tool in tools.by_name.values()],
        tool_choice=_tool_choice(request),
        output_format=_output_format(request),
        reasoning_effort=reasoning.effort if reasoning else None,
        clear_thinking=reasoning is not None and reasoning.context == "current_turn",
        sampling={name: value for name, value in sampling.items() if value is not None},
        wants_selection=request.indexshare is not None and request.indexshare.selected,
    )


def _chat_tool(tool: _Tool) -> dict[str, Any]:
    function = {
        "name": tool.prompt_name,
        "description": tool.function.description,
        "parameters": tool.function.parameters,
        "strict": tool.function.strict,
    }
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _tool_choice(request: ResponsesRequest) -> ToolChoice:
    choice, parallel = request.tool_choice, request.parallel_tool_calls is not False
    if isinstance(choice, FunctionChoice):
        return ToolChoice(mode="required", name=choice.name, parallel=parallel)
    return ToolChoice(mode=choice or "auto", parallel=parallel)


def _output_format(request: ResponsesRequest) -> OutputFormat | None:
    match request.text.format if request.text else None:
        case JsonObject():
            return OutputFormat(kind="json_object")
        case JsonSchema(schema=schema):
            return OutputFormat(kind="json_schema", definition=schema)
        case _:
            return None


def _messages(items: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI-style messages: the reasoning, text and calls that follow one another are one assistant message."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for index, value in enumerate(items):
        where = f"input[{index}]"
        value = {**value, "type": value.get("type") or "message"}
        match decode_block(value, ITEMS, where, f"items are {', '.join(ITEMS)}; nothing is stored here"):
            case MessageItem(role="assistant", content=content):
                _add_to_turn(messages, "content", _text(content, f"{where}.content"))
            case MessageItem(role=role, content=content):
                messages.append({"role": role, "content": _text(content, f"{where}.content")})
            case ReasoningItem(content=content):
                parts = content or ()
                decoded = [decode_block(part, REASONING_PARTS, where, "content is reasoning_text") for part in parts]
                if reasoning := "".join(part.text for part in decoded):
                    _add_to_turn(messages, "reasoning_content", reasoning)
            case FunctionCallItem() as call:
                function = {"name": _prompt_name(call.namespace, call.name), "arguments": call.arguments}
                _add_to_turn(messages, "tool_calls", [{"id": call.call_id, "type": "function", "function": function}])
            case FunctionCallOutputItem(call_id=call_id, output=output):
                content = _text(output, f"{where}.output", images=True)
                messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
    return messages


def _add_to_turn(messages: list[dict[str, Any]], key: str, value: Any) -> None:
    """Put a part of an assistant's turn into the last message, or into a new one where it would come out of order."""
    last = messages[-1] if messages else {}
    if key == "tool_calls" and last.get("role") == "assistant":
        last.setdefault(key, []).extend(value)
    elif last.get("role") == "assistant" and not any(name in last for name in _TURN_ORDER[_TURN_ORDER.index(key) :]):
        last[key] = value
    else:
        messages.append({"role": "assistant", key: value})


def _text(content: str | Sequence[dict[str, Any]], where: str, *, images: bool = False) -> str | list[dict[str, Any]]:
    """Parts as the chat format has them. images: let them through; the prompt says that the model cannot see them."""
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        if images and part.get("type") == "input_image":
            parts.append({"type": "image"})
        else:
            parts.append({"type": "text", "text": decode_block(part, TEXT_PARTS, f"{where}[{index}]", _TEXT_ONLY).text})
    return parts


class ResponseFold(BlockFold):
    """A reply as a response object and as the events of its stream."""

    def __init__(self, request: ResponsesRequest, tools: _Tools, reply: Reply) -> None:
        super().__init__(reply)
        self._names = tools.by_name
        self._output: list[dict[str, Any]] = []
        self._item: dict[str, Any] = {}
        self._num_events = 0
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "background": False,
            "store": False,
            "previous_response_id": None,
            "tools": tools.wire,
            "tool_choice": request.tool_choice or "auto",
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "reasoning": request.reasoning or {},
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "truncation": "disabled",
            "metadata": request.metadata or {},
        }
        for name in ("model", "instructions", "max_output_tokens", "temperature", "top_p", "user", "prompt_cache_key"):
            self._response[name] = getattr(request, name)

    def result(self) -> dict[str, Any]:
        """The response so far."""
        return {**self._response, "output": list(self._output)}

    def _event(self, kind: str, **fields: Any) -> Chunk:
        self._num_events += 1
        return {"type": f"response.{kind}", "sequence_number": self._num_events - 1, **fields}

    def _item_event(self, kind: str, **fields: Any) -> Chunk:
        return self._event(kind, item_id=self._item["id"], output_index=len(self._output), **fields)

    def _part_event(self, kind: str, **fields: Any) -> Chunk:
        return self._item_event(kind, content_index=0, **fields)

    def _start(self) -> list[Chunk]:
        return [self._event("created", response=self.result()), self._event("in_progress", response=self.result())]

    def _idle(self) -> Chunk:
        return self._event("indexshare")  # only clients that asked for the extension see it

    def _open_block(self, kind: BlockKind) -> list[Chunk]:
        if kind == "reasoning":
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": [], "content": []}
        else:
            item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "content": []}
        return [*self._add_item(item), self._part_event("content_part.added", part=_part(kind, ""))]

    def _grow_block(self, kind: BlockKind, text: str) -> Chunk:
        return self._part_event(f"{_part_name(kind)}.delta", delta=text, **_logprobs(kind))

    def _end_block(self, kind: BlockKind, text: str, complete: bool) -> list[Chunk]:
        part = _part(kind, text)
        return [
            self._part_event(f"{_part_name(kind)}.done", text=text, **_logprobs(kind)),
            self._part_event("content_part.done", part=part),
            self._finish_item("completed" if complete else "incomplete", content=[part]),
        ]

    def _call(self, call: ToolCallEvent) -> list[Chunk]:
        tool = self._names.get(call.name)
        name = tool.function.name if tool else call.name  # the model may call what is not there; the client says so
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call.id, "name": name}
        if tool and tool.namespace:
            item["namespace"] = tool.namespace
        arguments = msgspec.json.encode(call.arguments).decode()
        return [
            *self._add_item({**item, "arguments": ""}),
            self._item_event("function_call_arguments.delta", delta=arguments),
            self._item_event("function_call_arguments.done", arguments=arguments, name=name),
            self._finish_item("completed", arguments=arguments),
        ]

    def _add_item(self, item: dict[str, Any]) -> list[Chunk]:
        self._item = {**item, "status": "in_progress"}
        return [self._event("output_item.added", output_index=len(self._output), item=self._item)]

    def _finish_item(self, status: str, **fields: Any) -> Chunk:
        item = {**self._item, "status": status, **fields}
        event = self._event("output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        return event

    def _finish(self, reason: FinishReason, usage: Usage, stop_text: str | None) -> list[Chunk]:
        status = "incomplete" if reason == "length" else "completed"
        if reason == "length":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._response |= {"status": status, "completed_at": int(time.time()), "usage": self._usage(usage)}
        return [self._event(status, response=self.result())]

    def _fail(self, message: str) -> list[Chunk]:
        self._response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        return [self._event("failed", response=self.result())]

    def _usage(self, usage: Usage) -> dict[str, Any]:
        return {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        }


def _part_name(kind: BlockKind) -> str:
    return "reasoning_text" if kind == "reasoning" else "output_text"


def _part(kind: BlockKind, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _part_name(kind), "text": text}
    return part if kind == "reasoning" else {**part, "annotations": [], "logprobs": []}


def _logprobs(kind: BlockKind) -> dict[str, Any]:
    return {} if kind == "reasoning" else {"logprobs": []}
