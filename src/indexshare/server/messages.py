"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens.

Thinking is off unless `thinking` asks for it, as in Anthropic's API. All earlier thinking blocks go into the prompt
(clear_thinking=False), so that what a client sends back is the beginning that the prefix cache knows.

Accepted and ignored, because nothing here changes with them: metadata, service_tier, inference_geo, user_profile_id,
betas, speed, cache_control anywhere (prefixes are always reused), diagnostics, context_management (nothing is cleared
from the conversation: a prompt that is too long is an error), the headers anthropic-version and anthropic-beta,
thinking.display (reasoning comes in full), citations; of tools allowed_callers, eager_input_streaming, input_examples.
Redacted thinking is left out of the prompt: only the server that made it can read it.

Refused with 400: images and documents in a message (a text model; an image in a tool result is allowed, and the prompt
tells the model that it cannot see it), tools that are not custom ones, a conversation that ends with the assistant,
and every field that is not declared in messages_types.py.
"""

import base64
import dataclasses
import hashlib
import uuid
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.chat.types import FinishReason, ToolCallEvent, Usage
from indexshare.server.blocks import BlockFold, BlockKind, Chunk, decode_block, respond
from indexshare.server.http import ApiError, documented, json_response, read_json
from indexshare.server.messages_types import (
    BLOCKS,
    RESULT_BLOCKS,
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from indexshare.server.system_prompt import without_header_lines
from indexshare.server.types import ChatRequest, OutputFormat, Reply, Service, ToolChoice

_CUSTOM_ONLY = 'declare a tool of type "custom" with name, description and input_schema'


def routes(service: Service) -> list[Route]:
    """The routes of this dialect."""

    @documented(summary="One reply, or its events", body=MessagesRequest, stream=True)
    async def create(http: Request) -> Response:
        request = await read_json(http, MessagesRequest)
        chat = _chat_request(request, service)
        reply = await service.chat(chat, tenant=getattr(http.state, "tenant", ""))
        return await respond(http, reply, MessageFold(request.model, reply), stream=bool(request.stream))

    @documented(summary="Tokens of the prompt", body=CountTokensRequest)
    async def count_tokens(http: Request) -> Response:
        chat = _prompt_request(await read_json(http, CountTokensRequest), service)
        return json_response({"input_tokens": len(await service.encode_chat(chat))})

    return [
        Route("/v1/messages", create, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


def _chat_request(request: MessagesRequest, service: Service) -> ChatRequest:
    """The neutral request. Errors as in `_prompt_request`."""
    thinking = request.thinking
    if thinking and thinking.budget_tokens is not None and thinking.budget_tokens >= request.max_tokens:
        raise ApiError(400, "thinking: budget_tokens must be less than max_tokens", param="thinking")
    sampling = {
        "max_new_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
    }
    return dataclasses.replace(
        _prompt_request(request, service),
        sampling={name: value for name, value in sampling.items() if value is not None},
        wants_selection=request.indexshare is not None and request.indexshare.selected,
    )


def _prompt_request(request: CountTokensRequest, service: Service) -> ChatRequest:
    """The neutral request without what concerns drawing tokens.

    Raises ApiError 400 for what cannot be served, 404 for another model.
    """
    if request.model not in service.model_names:
        raise ApiError(404, f"model: there is no {request.model!r:.200}; use {service.model_names[0]!r}", param="model")
    if request.thread is not None:
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise ApiError(
            400, "thread: nothing is stored here; send the whole conversation", param="thread", details=details
        )
    if request.messages[-1].role == "assistant":
        raise ApiError(400, "messages: the last one must not be the assistant's; a prefilled answer is not supported")
    thinking, config = request.thinking, request.output_config
    enabled = thinking is not None and thinking.type != "disabled"
    if thinking is not None and (thinking.budget_tokens is not None) != (thinking.type == "enabled"):
        raise ApiError(400, 'thinking: budget_tokens goes with type "enabled", and only with it', param="thinking")
    answer_format = request.output_format or (config.format if config else None)
    return ChatRequest(
        messages=[*_system_message(request), *_messages(request.messages)],
        tools=[_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())],
        tool_choice=_tool_choice(request),
        output_format=OutputFormat(kind="json_schema", definition=answer_format.schema) if answer_format else None,
        # Clients send an effort also when they do not want thinking; without thinking it has no meaning here.
        reasoning_effort=config.effort if config and enabled else None,
        enable_thinking=enabled,
        thinking_budget=thinking.budget_tokens if thinking else None,
        clear_thinking=False,
    )


def _tool_choice(request: CountTokensRequest) -> ToolChoice:
    choice = request.tool_choice
    if choice is None:
        return ToolChoice()
    if (choice.name is not None) != (choice.type == "tool"):
        raise ApiError(400, 'tool_choice: name goes with type "tool", and only with it', param="tool_choice")
    parallel = not choice.disable_parallel_tool_use
    match choice.type:
        case "auto" | "none":
            return ToolChoice(mode=choice.type, parallel=parallel)
        case "any" | "tool":
            return ToolChoice(mode="required", name=choice.name, parallel=parallel)


def _tool(value: dict[str, Any], where: str) -> dict[str, Any]:
    value = {**value, "type": value.get("type") or "custom"}
    tool: Tool = decode_block(value, {"custom": Tool}, where, _CUSTOM_ONLY)
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
        "defer_loading": tool.defer_loading,
    }
    return {"type": "function", "function": {key: item for key, item in function.items() if item is not None}}


def _system_message(request: CountTokensRequest) -> list[dict[str, Any]]:
    # Header lines go block by block: Claude Code sends them as a block of their own, with no line end.
    texts = [without_header_lines(block.text) for block in _blocks(request.system or (), "system", "system")]
    content = "\n\n".join(text for text in texts if text)
    return [{"role": "system", "content": content}] if content else []


def _messages(messages: Sequence[InputMessage]) -> Iterator[dict[str, Any]]:
    """OpenAI-style messages. Neighbouring assistant messages are one turn, as in Anthropic's API."""
    indexed = [
        (message.role, _blocks(message.content, message.role, f"messages[{index}].content"))
        for index, message in enumerate(messages)
    ]
    for role, group in groupby(indexed, key=lambda item: item[0]):
        if role == "assistant":
            yield _assistant_message([block for _, blocks in group for block in blocks])
        else:
            for _, blocks in group:
                yield from _input_messages(role, blocks)


def _blocks(content: str | Sequence[dict[str, Any]], role: str, where: str) -> list[Any]:
    if isinstance(content, str):
        return [TextBlock(type="text", text=content)]
    hint = f"this is a text model, and {role} content has blocks of type {', '.join(BLOCKS[role])}"
    return [decode_block(block, BLOCKS[role], f"{where}[{index}]", hint) for index, block in enumerate(content)]


def _input_messages(role: str, blocks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Tool results become messages of their own; the text between them stays where it is."""
    for is_result, group in groupby(blocks, key=lambda block: isinstance(block, ToolResultBlock)):
        if is_result:
            yield from map(_tool_message, group)
        else:
            yield {"role": role, "content": [{"type": "text", "text": block.text} for block in group]}


def _tool_message(block: ToolResultBlock) -> dict[str, Any]:
    content = [{"type": "text", "text": block.content}] if isinstance(block.content, str) else block.content or []
    parts = [{"type": "text", "text": "Error: "}] if block.is_error else []  # the chat format has no flag for it
    hint = f"a tool result has blocks of type {', '.join(RESULT_BLOCKS)}"
    for index, value in enumerate(content):
        where = f"the tool_result for {block.tool_use_id!r}, content[{index}]"
        match decode_block(value, RESULT_BLOCKS, where, hint):
            case TextBlock(text=text):
                parts.append({"type": "text", "text": text})
            case ToolReferenceBlock(tool_name=name):
                parts.append({"type": "tool_reference", "name": name})
            case _:
                parts.append({"type": "image"})
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": parts}


def _assistant_message(blocks: Sequence[Any]) -> dict[str, Any]:
    reasoning = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(block.text for block in blocks if isinstance(block, TextBlock)),
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    return {**message, "tool_calls": calls} if calls else message


class MessageFold(BlockFold):
    """A reply as a message and as the events of its stream."""

    def __init__(self, model: str, reply: Reply) -> None:
        super().__init__(reply)
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._content: list[dict[str, Any]] = []
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None
        self._usage: dict[str, int] | None = None

    def result(self) -> dict[str, Any]:
        """The message so far."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(self._content),
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage or _usage(self._usage_so_far()),
        }

    def _start(self) -> list[Chunk]:
        return [{"type": "message_start", "message": self.result()}]

    def _idle(self) -> Chunk:
        return {"type": "ping"}

    def _open_block(self, kind: BlockKind) -> list[Chunk]:
        return [self._start_block(_thinking_block("", "") if kind == "reasoning" else {"type": "text", "text": ""})]

    def _grow_block(self, kind: BlockKind, text: str) -> Chunk:
        if kind == "reasoning":
            return self._delta({"type": "thinking_delta", "thinking": text})
        return self._delta({"type": "text_delta", "text": text})

    def _end_block(self, kind: BlockKind, text: str, complete: bool) -> list[Chunk]:
        if kind == "text":
            return [self._stop_block({"type": "text", "text": text})]
        signature = _signature(text)
        delta = self._delta({"type": "signature_delta", "signature": signature})
        return [delta, self._stop_block(_thinking_block(text, signature))]

    def _call(self, call: ToolCallEvent) -> list[Chunk]:
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        arguments = msgspec.json.encode(call.arguments).decode()
        return [
            self._start_block(block),
            self._delta({"type": "input_json_delta", "partial_json": arguments}),
            self._stop_block({**block, "input": dict(call.arguments)}),
        ]

    def _finish(self, reason: FinishReason, usage: Usage, stop_text: str | None) -> list[Chunk]:
        if reason == "length":
            self._stop_reason = "max_tokens"
        elif stop_text is not None:
            self._stop_reason, self._stop_sequence = "stop_sequence", stop_text
        else:  # clients wait for a block they were promised
            called = any(block["type"] == "tool_use" for block in self._content)
            self._stop_reason = "tool_use" if called else "end_turn"
        self._usage = _usage(usage)
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        return [{"type": "message_delta", "delta": delta, "usage": self._usage}, {"type": "message_stop"}]

    def _fail(self, message: str) -> list[Chunk]:
        return [{"type": "error", "error": {"type": "api_error", "message": message}}]

    def _start_block(self, block: dict[str, Any]) -> Chunk:
        return {"type": "content_block_start", "index": len(self._content), "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Chunk:
        return {"type": "content_block_delta", "index": len(self._content), "delta": delta}

    def _stop_block(self, block: dict[str, Any]) -> Chunk:
        self._content.append(block)
        return {"type": "content_block_stop", "index": len(self._content) - 1}


def _thinking_block(text: str, signature: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": signature}


def _signature(text: str) -> str:
    """A digest of the reasoning: clients demand a signature and send it back; it proves nothing and is not checked."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts cached tokens apart. Nothing is charged for writing the cache, so those are 0."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_completion_tokens,
    }
