"""Messages in, events out: the neutral types between the API dialects, the template and the parser.

Field names follow the OpenAI chat format, which is also what GLM-5.2's template reads. No torch here.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from indexshare.errors import RequestError

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]

ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
MEDIA_TYPES = ("image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio")

_MESSAGE_KEYS = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
# Client libraries send these back with null or [] in every assistant message; a value in them is not supported.
_EMPTY_KEYS = {"refusal", "audio", "function_call", "annotations"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call the model made. `arguments` maps argument names to JSON values."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    @staticmethod
    def from_dict(data: object) -> "ToolCall":
        """Read `{"id", "type": "function", "function": {"name", "arguments"}}`; arguments: an object or its JSON text.

        Raises RequestError for unknown keys, a wrong type, or arguments that are not one JSON object.
        """
        call = _mapping(data, "a tool call")
        _only_keys(call, {"id", "type", "function", "index"}, "a tool call")
        if call.get("type", "function") != "function":
            raise RequestError(f'tool call type {call["type"]!r} is not supported; use "function"')
        function = _mapping(call.get("function"), "tool call 'function'")
        _only_keys(function, {"name", "arguments"}, "tool call 'function'")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise RequestError("a tool call needs a function name (a non-empty string)")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments) if arguments.strip() else {}
            except ValueError as error:
                raise RequestError(f"the arguments of tool call {name!r} are not JSON: {error}") from error
        return ToolCall(
            id=_text(call.get("id", ""), "tool call id"),
            name=name,
            arguments=dict(_mapping(arguments, f"the arguments of tool call {name!r}")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation, checked when made.

    `content` is text, or parts (`{"type": "text", "text"}`, media, and for role "tool" either only
    `{"type": "tool_reference", "name"}` or only `{"output"}`). Adjacent text parts are joined, and parts that are all
    text become one string, so that a control token cannot hide in the seam of two parts. Media keep only their type.
    """

    role: Role
    content: str | Sequence[Any] = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RequestError(f"unknown role {self.role!r}; use one of {', '.join(ROLES)}")
        if self.role != "assistant" and (self.reasoning_content is not None or self.tool_calls):
            raise RequestError(f"only assistant messages carry reasoning_content or tool_calls, not {self.role!r}")
        object.__setattr__(self, "content", _normalise_content(self.content, self.role))

    @staticmethod
    def from_dict(data: object) -> "Message":
        """Read an OpenAI-style message ("developer" is read as "system"). Raises RequestError for anything unknown."""
        message = _mapping(data, "a message")
        _only_keys(message, _MESSAGE_KEYS | {key for key in _EMPTY_KEYS if not message.get(key)}, "a message")
        role = message.get("role")
        content = message.get("content")
        if content is None and role != "assistant":
            raise RequestError(f"a message of role {role!r} needs content")
        calls = message.get("tool_calls") or ()
        if not isinstance(calls, (list, tuple)):
            raise RequestError("tool_calls must be a list")
        return Message(
            role="system" if role == "developer" else role,  # type: ignore[arg-type]  # checked in __post_init__
            content="" if content is None else content,
            reasoning_content=_optional_text(message.get("reasoning_content"), "reasoning_content"),
            tool_calls=tuple(call if isinstance(call, ToolCall) else ToolCall.from_dict(call) for call in calls),
            tool_call_id=_optional_text(message.get("tool_call_id"), "tool_call_id"),
            name=_optional_text(message.get("name"), "name"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary a chat template reads: arguments as objects, absent fields left out."""
        content = self.content if isinstance(self.content, str) else list(self.content)
        data: dict[str, Any] = {"role": self.role, "content": content}
        for key in ("reasoning_content", "tool_call_id", "name"):
            if (value := getattr(self, key)) is not None:
                data[key] = value
        if self.tool_calls:
            data["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.tool_calls
            ]
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one reply. num_cached_tokens: the part of the prompt that was not computed again.

    num_reasoning_tokens: the part of the reply before `</think>`.
    """

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """The prompt is accepted; `num_prompt_tokens` is its length."""

    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEvent:
    """One complete tool call. `raw` is the model's own text of it, tags included."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    raw: str = field(repr=False, default="")


@dataclass(frozen=True, slots=True)
class Warning:
    """Something in the reply was repaired or passed on as plain text."""

    message: str


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a reply that ended in order. stop_text: the one that ended it, if one did."""

    reason: FinishReason
    usage: Usage | None = None
    stop_text: str | None = None


@dataclass(frozen=True, slots=True)
class Error:
    """The last event of a reply that failed, from a source that cannot raise to its reader, such as a reply sent over a
    network. `LLM.chat` makes none: it raises."""

    message: str


Event = Start | Text | Reasoning | ToolCallEvent | Warning | Done | Error


def merge_events(events: Iterable[Event]) -> list[Event]:
    """Join neighbouring Text events and neighbouring Reasoning events; everything else stays as it is."""
    merged: list[Event] = []
    pieces: list[str] = []
    kind: type[Text] | type[Reasoning] | None = None

    def flush() -> None:
        if kind is not None and pieces:
            merged.append(kind("".join(pieces)))
        pieces.clear()

    for event in events:
        if isinstance(event, (Text, Reasoning)):
            if type(event) is not kind:
                flush()
                kind = type(event)
            pieces.append(event.text)
        else:
            flush()
            kind = None
            merged.append(event)
    flush()
    return merged


def reply_message(events: Iterable[Event]) -> Message:
    """The assistant message that a reply's events add up to, ready to be sent back in the next request."""
    events = list(events)
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    return Message(
        role="assistant",
        content="".join(event.text for event in events if isinstance(event, Text)),
        reasoning_content=reasoning or None,
        tool_calls=tuple(
            ToolCall(id=event.id, name=event.name, arguments=event.arguments)
            for event in events
            if isinstance(event, ToolCallEvent)
        ),
    )


def parse_json(text: str) -> Any:
    """Strict JSON: ValueError for NaN, infinities, nesting beyond Python's stack and lone surrogates."""
    try:
        value = json.loads(text, parse_constant=_reject_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _normalise_content(content: object, role: str) -> str | tuple[dict[str, Any], ...]:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"content must be text or a list of parts, not {type(content).__name__}")
    parts: list[dict[str, Any]] = []
    for item in content:
        part = _normalise_part(item, role)
        if part.get("type") == "text" and parts and parts[-1].get("type") == "text":
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        else:
            parts.append(part)
    if not parts:
        return ""
    if len(parts) == 1 and parts[0].get("type") == "text":
        return parts[0]["text"]
    kinds = {"output" if "output" in part else part["type"] for part in parts}
    if len(kinds) > 1 and kinds & {"output", "tool_reference"}:
        raise RequestError("a tool result lists either only tool_reference parts, only output parts, or text and media")
    return tuple(parts)


def _normalise_part(item: object, role: str) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    part = _mapping(item, "a content part")
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), "the text of a content part")}
    if kind in MEDIA_TYPES:
        return {"type": kind}
    if role == "tool" and kind == "tool_reference":
        return {"type": kind, "name": _text(part.get("name"), "the name of a tool_reference")}
    if role == "tool" and kind is None and "output" in part:
        return {"output": _text(part["output"], "the output of a tool result")}
    raise RequestError(f"content part of type {kind!r} is not supported in a {role!r} message")


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{what} must be an object, not {type(value).__name__}")
    return value


def _only_keys(value: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := [key for key in value if key not in known]:
        raise RequestError(f"unknown key {unknown[0]!r} in {what}; known keys: {', '.join(sorted(known))}")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{what} must be text, not {type(value).__name__}")
    return value


def _optional_text(value: object, what: str) -> str | None:
    return None if value is None else _text(value, what)
