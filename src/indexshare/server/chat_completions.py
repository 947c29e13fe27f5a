"""`/v1/chat/completions`: OpenAI's chat API, with the fields of vLLM, SGLang and Z.ai that mean something here.

Beyond OpenAI's: top_k, min_p, repetition_penalty, structured_outputs, thinking, enable_thinking, clear_thinking,
chat_template_kwargs (those two and reasoning_effort), reasoning_content in messages, and indexshare. openai_types.py
lists what is ignored and what is refused. A tool call comes in one chunk, complete. logprobs.content has an entry for
every drawn token: reasoning, tool calls and the token that ends the reply included. With n > 1 the id of a tool call
ends in the index of its choice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.chat.types import MEDIA_TYPES, Done, Event, Message, Reasoning, Text, ToolCallEvent
from indexshare.engine.sampler import SampledToken
from indexshare.errors import RequestError
from indexshare.server.http import ApiError, documented, read_json
from indexshare.server.openai_replies import Answer, Exchange, FinishReason, Fold, token_text, wire_logprob
from indexshare.server.openai_types import ChatBody, NamedTool, TemplateArguments
from indexshare.server.types import ChatRequest, OutputFormat, Reply, Service, ToolChoice

T = TypeVar("T")

# What the openai package adds to messages that it has parsed, and sends back with them.
_CLIENT_KEYS = ("parsed", "parsed_arguments", "provider_specific_fields")


class FunctionCall(msgspec.Struct):
    """The called function; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A tool call; `index` only in chunks."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | UnsetType = UNSET


class AssistantMessage(msgspec.Struct):
    """The message of a choice. content is null when there are only tool calls."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """A token that could have been drawn. bytes: of its text, which may be part of a character."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A drawn token and the most probable ones in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    """One entry for each drawn token."""

    content: list[TokenLogprob]
    refusal: None = None


class ChunkChoice(msgspec.Struct):
    """A choice in a chunk."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class Choice(msgspec.Struct):
    """A choice in a whole answer."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


def routes(service: Service) -> list[Route]:
    """The endpoint over `service`."""

    @documented(summary="Answer a conversation", body=ChatBody, response=Answer[Choice], stream=True)
    async def chat_completions(request: Request) -> Response:
        body = await read_json(request, ChatBody)
        exchange: Exchange[ChatRequest, ChunkChoice] = Exchange(
            request, service, body, kind="chat.completion", chunk_kind="chat.completion.chunk"
        )
        tenant = getattr(request.state, "tenant", "")
        return await exchange.respond(
            chat_requests(body),
            lambda neutral: service.chat(neutral, tenant=tenant),
            lambda index, reply: ChatFold(index, reply, service, body),
        )

    return [Route("/v1/chat/completions", chat_completions, methods=["POST"])]


def chat_requests(body: ChatBody) -> list[ChatRequest]:
    """A neutral request for each of the n choices. Raises ApiError for what cannot be honoured."""
    body.check()
    kwargs, thinking = body.chat_template_kwargs or TemplateArguments(), body.thinking
    is_enabled = None if thinking is None else thinking.type == "enabled"
    neutral = ChatRequest(
        messages=[_message(index, message) for index, message in enumerate(body.messages)],
        tools=[tool.to_dict() for tool in body.tools or ()],
        tool_choice=_tool_choice(body),
        output_format=_output_format(body),
        reasoning_effort=_agreed("reasoning_effort", body.reasoning_effort, kwargs.reasoning_effort),
        enable_thinking=_agreed("enable_thinking", body.enable_thinking, kwargs.enable_thinking, is_enabled),
        thinking_budget=thinking.budget_tokens if thinking is not None and is_enabled else None,
        clear_thinking=_agreed(
            "clear_thinking",
            body.clear_thinking,
            kwargs.clear_thinking,
            None if thinking is None else thinking.clear_thinking,
        ),
        wants_selection=body.wants_selection,
    )
    max_new_tokens = _agreed("max_completion_tokens", body.max_completion_tokens, body.max_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return [replace(neutral, sampling=sampling) for sampling in body.sampling(max_new_tokens, logprobs)]


def _agreed(name: str, *values: T | None) -> T | None:
    """The value of a field that a client can give in several places."""
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given):
        raise ApiError(400, f"{name} is given twice, with different values", param=name)
    return given[0] if given else None


def _message(index: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """A checked message as templates read it, from the forms that clients send."""
    place = f"messages[{index}]"
    message = {key: value for key, value in data.items() if key not in _CLIENT_KEYS}
    reasoning = message.pop("reasoning", None)
    message["reasoning_content"] = _agreed(f"{place}.reasoning_content", message.get("reasoning_content"), reasoning)
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_tool_call(call) for call in calls]
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") in (*MEDIA_TYPES, "file"):
            message_text = (
                f"{place} has a part of type {part['type']!r}: this is a text model; remote URLs are never fetched"
            )
            raise ApiError(400, message_text, param=f"{place}.content")
    try:
        return Message.from_dict(message).to_dict()
    except RequestError as error:
        raise ApiError(400, f"{place}: {error}", param=place) from error


def _tool_call(call: object) -> object:
    if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
        return call  # Message says what is wrong with it
    return {**call, "function": {key: value for key, value in function.items() if key not in _CLIENT_KEYS}}


def _tool_choice(body: ChatBody) -> ToolChoice:
    choice, names = body.tool_choice, {tool.function.name for tool in body.tools or ()}
    is_parallel = body.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            message = f"tool_choice names {choice.function.name!r}, which is not one of the tools"
            raise ApiError(400, message, param="tool_choice")
        return ToolChoice(mode="required", name=choice.function.name, parallel=is_parallel)
    if choice == "required":
        if not names:
            raise ApiError(400, "tool_choice is required, but there are no tools", param="tool_choice")
        return ToolChoice(mode="required", parallel=is_parallel)
    return ToolChoice(mode="none" if choice == "none" else "auto", parallel=is_parallel)


def _output_format(body: ChatBody) -> OutputFormat | None:
    output_format = body.response_format.output_format() if body.response_format else None
    if body.structured_outputs is None:
        return output_format
    if output_format is not None:
        raise ApiError(400, "use response_format or structured_outputs, not both", param="structured_outputs")
    return body.structured_outputs.output_format()


class ChatFold(Fold[ChunkChoice]):
    """The deltas of one choice."""

    def __init__(self, index: int, reply: Reply, service: Service, body: ChatBody) -> None:
        super().__init__(index, reply, wants_logprobs=bool(body.logprobs))
        self._service = service
        self._id_suffix = f"_{index}" if body.num_choices > 1 else ""
        self._num_calls = 0

    def opening(self) -> ChunkChoice:
        return ChunkChoice(self.index, Delta(role="assistant", content=""))

    def empty(self) -> ChunkChoice:
        return ChunkChoice(self.index, Delta())

    def translate(self, event: Event) -> ChunkChoice | None:
        match event:
            case Text(text) if text:
                delta = Delta(content=text)
            case Reasoning(text) if text:
                delta = Delta(reasoning_content=text)
            case ToolCallEvent():
                function = FunctionCall(event.name, json.dumps(event.arguments, ensure_ascii=False))
                delta = Delta(
                    tool_calls=[ToolCall(event.id + self._id_suffix, "function", function, index=self._num_calls)]
                )
                self._num_calls += 1
            case Done():
                return ChunkChoice(self.index, Delta(), finish_reason=self.finish_reason(event))
            case _:
                return None
        return ChunkChoice(self.index, delta)

    def logprobs(self, tokens: Sequence[SampledToken]) -> ChoiceLogprobs:
        return ChoiceLogprobs(
            [
                TokenLogprob(
                    **self._token(token.token_id, token.logprob),
                    top_logprobs=[TopLogprob(**self._token(*top)) for top in token.top_logprobs or ()],
                )
                for token in tokens
                if token.logprob is not None
            ]
        )

    def whole(self, parts: Sequence[ChunkChoice]) -> Choice:
        deltas = [part.delta for part in parts]
        content = "".join(delta.content for delta in deltas if delta.content is not UNSET)
        reasoning = "".join(delta.reasoning_content for delta in deltas if delta.reasoning_content is not UNSET)
        calls = [call for delta in deltas if delta.tool_calls is not UNSET for call in delta.tool_calls]
        message = AssistantMessage(
            role="assistant",
            content=content if content or not calls else None,
            reasoning_content=reasoning or UNSET,
            tool_calls=[ToolCall(call.id, call.type, call.function) for call in calls] or UNSET,
        )
        tokens = [token for part in parts if part.logprobs is not None for token in part.logprobs.content]
        reasons = [part.finish_reason for part in parts if part.finish_reason is not None]
        logprobs = ChoiceLogprobs(tokens) if self.wants_logprobs else None
        return Choice(self.index, message, logprobs, reasons[0] if reasons else None)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._service.token_bytes(token_id)
        return {"token": token_text(data), "bytes": list(data), "logprob": wire_logprob(logprob)}
