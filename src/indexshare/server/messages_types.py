"""The JSON of Anthropic's Messages API, as far as it is understood here; `messages.py` says what is ignored and why."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from indexshare.server.blocks import Extension

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Name = Annotated[str, msgspec.Meta(min_length=1)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class TextBlock(_Strict):
    """Text of any role. Ignored: citations, cache_control."""

    type: str
    text: str
    citations: Any = None
    cache_control: Any = None


class ThinkingBlock(_Strict):
    """Reasoning of an earlier turn. Any signature is accepted."""

    type: str
    thinking: str
    signature: str | None = None
    cache_control: Any = None


class RedactedThinkingBlock(_Strict):
    """Reasoning that only the server that made it can read; left out of the prompt."""

    type: str
    data: str
    cache_control: Any = None


class ToolUseBlock(_Strict):
    """A call the model made. Ignored: caller, toolset_name, cache_control."""

    type: str
    id: str
    name: Name
    input: dict[str, Any]
    caller: Any = None
    toolset_name: str | None = None
    cache_control: Any = None


class ToolResultBlock(_Strict):
    """What a tool answered: text, or blocks as in RESULT_BLOCKS. Ignored: toolset_name, cache_control."""

    type: str
    tool_use_id: str
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None
    toolset_name: str | None = None
    cache_control: Any = None


class ToolReferenceBlock(_Strict):
    """In a tool result: a tool with defer_loading that the model may use from now on."""

    type: str
    tool_name: Name
    cache_control: Any = None


class ImageBlock(msgspec.Struct):
    """In a tool result: the prompt says that there was an image, and that the model cannot see it."""

    type: str


BLOCKS: Mapping[str, Mapping[str, type[msgspec.Struct]]] = {
    "system": {"text": TextBlock},
    "user": {"text": TextBlock, "tool_result": ToolResultBlock},
    "assistant": {
        "text": TextBlock,
        "thinking": ThinkingBlock,
        "redacted_thinking": RedactedThinkingBlock,
        "tool_use": ToolUseBlock,
    },
}
RESULT_BLOCKS: Mapping[str, type[msgspec.Struct]] = {
    "text": TextBlock,
    "tool_reference": ToolReferenceBlock,
    "image": ImageBlock,
}


class InputMessage(_Strict):
    """One message; the blocks are read by `decode_block`."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class Tool(_Strict):
    """A tool that the client runs. Ignored: cache_control, allowed_callers, eager_input_streaming, input_examples."""

    name: Name
    input_schema: dict[str, Any]
    type: str | None = None
    description: str | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    cache_control: Any = None
    allowed_callers: Any = None
    eager_input_streaming: bool | None = None
    input_examples: Any = None


class ToolChoiceField(_Strict):
    """`tool_choice`. name: with type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(_Strict):
    """`thinking`. Ignored: display (reasoning comes in full), block_binding (signatures are not checked)."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None
    display: str | None = None
    block_binding: Any = None


class JsonFormat(_Strict):
    """The answer must match a JSON schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(_Strict):
    """`output_config`. task_budget must be null."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None
    task_budget: None = None


class CountTokensRequest(_Strict, kw_only=True):
    """The body of /v1/messages/count_tokens, and what /v1/messages has in common with it."""

    model: str
    messages: Annotated[list[InputMessage], msgspec.Meta(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoiceField | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    mcp_servers: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None
    container: None = None
    # Accepted and ignored; messages.py says why.
    betas: Any = None
    thread: Any = None
    cache_control: Any = None
    context_management: Any = None
    speed: str | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The body of /v1/messages."""

    max_tokens: Positive
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    stream: bool | None = None
    indexshare: Extension | None = None
    # Accepted and ignored; messages.py says why.
    diagnostics: Any = None
    inference_geo: str | None = None
    metadata: Any = None
    service_tier: str | None = None
    user_profile_id: str | None = None
