"""The JSON of OpenAI's Responses API, as far as it is understood here; `responses.py` says what is ignored and why."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from indexshare.server.blocks import Extension
from indexshare.server.openai_types import Effort

Name = Annotated[str, msgspec.Meta(min_length=1)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    pass


class TextPart(_Strict):
    """`input_text`, `output_text`, and the texts of reasoning. Ignored: annotations, logprobs."""

    type: str
    text: str
    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None


class MessageItem(_Strict):
    """A message of any role. Ignored: id, status, phase."""

    type: str
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class ReasoningItem(_Strict):
    """Reasoning of an earlier turn; `content` is read. Ignored: summary, encrypted_content (none is made here)."""

    type: str
    content: list[dict[str, Any]] | None = None
    summary: Any = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


class FunctionCallItem(_Strict):
    """A call the model made. arguments: the text of a JSON object. Ignored: id, status, caller."""

    type: str
    call_id: str
    name: Name
    arguments: str
    namespace: str | None = None
    id: str | None = None
    status: str | None = None
    caller: Any = None
    parsed_arguments: Any = None


class FunctionCallOutputItem(_Strict):
    """What a function answered. Ignored: id, status, name, namespace, caller."""

    type: str
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None
    name: str | None = None
    namespace: str | None = None
    caller: Any = None


ITEMS: Mapping[str, type[msgspec.Struct]] = {
    "message": MessageItem,
    "reasoning": ReasoningItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
}
TEXT_PARTS: Mapping[str, type[msgspec.Struct]] = {"input_text": TextPart, "output_text": TextPart}
REASONING_PARTS: Mapping[str, type[msgspec.Struct]] = {"reasoning_text": TextPart}


class FunctionTool(_Strict):
    """A function that the client runs. Ignored: defer_loading (offered at once), allowed_callers, output_schema."""

    type: str
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: Any = None
    output_schema: Any = None


class NamespaceTool(_Strict):
    """Functions with a common prefix, as Codex sends those of MCP servers."""

    type: str
    name: Name
    tools: list[dict[str, Any]]
    description: str | None = None


TOOLS: Mapping[str, type[msgspec.Struct]] = {"function": FunctionTool, "namespace": NamespaceTool}


class FunctionChoice(_Strict):
    """`tool_choice`: this function must be called."""

    type: Literal["function"]
    name: Name


class ReasoningField(_Strict):
    """`reasoning`. Ignored: summary, generate_summary (the reasoning itself is in the reply)."""

    effort: Effort | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Literal["standard"] | None = None
    summary: str | None = None
    generate_summary: str | None = None


class PlainText(_Strict, tag="text"):
    """Any text."""


class JsonObject(_Strict, tag="json_object"):
    """Any JSON object."""


class JsonSchema(_Strict, tag="json_schema"):
    """JSON that matches a schema, strict or not. Ignored: name, description."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextField(_Strict):
    """`text`. Ignored: verbosity."""

    format: PlainText | JsonObject | JsonSchema | None = None
    verbosity: str | None = None


class ResponsesRequest(_Strict, kw_only=True):
    """The body of /v1/responses."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    reasoning: ReasoningField | None = None
    text: TextField | None = None
    stream: bool | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    indexshare: Extension | None = None
    # Nothing is stored and nothing runs later: only values that ask for neither are taken.
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    context_management: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=0)] | None = None
    # Accepted and ignored; responses.py says why.
    client_metadata: Any = None
    max_tool_calls: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    stream_options: Any = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
