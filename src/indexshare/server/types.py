"""What the API dialects and the service say to each other: neutral requests in, pieces of a reply out."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from indexshare.chat.types import Event
from indexshare.engine.sampler import SampledToken


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """mode: may, must not or must the model call tools; `name`: it must call this one. parallel: several calls."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """What the answer must match: `json_object` (definition None), a JSON schema, a regular expression or a grammar.

    definition: the schema (a mapping or a bool), the pattern, or the grammar's text (Lark as llguidance reads it).
    """

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    definition: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One chat request, whatever dialect it came in.

    messages, tools: OpenAI-style dictionaries (chat/types.py reads them). sampling: keyword arguments of SamplingParams
    that the client gave, and only those. reasoning_effort: as the client wrote it, checked by the service.
    thinking_budget: tokens of reasoning after which the thinking block is closed. clear_thinking None: as the template
    does by default. wants_selection: report which positions sparse attention read for each token.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    output_format: OutputFormat | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    clear_thinking: bool | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    wants_selection: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """Continue a text, or token ids. echo: log-probabilities of the prompt's own tokens too (`Reply.prompt_tokens`).

    With echo, sampling may hold max_new_tokens=0: score and draw nothing.
    """

    prompt: str | Sequence[int]
    echo: bool = False
    output_format: OutputFormat | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    wants_selection: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step of the engine adds to a reply.

    events: the last piece ends with Done (reason and usage); a failure after the start is an Error, the last one.
    For a completion all text is in Text events. tokens: those drawn in this step, with log-probabilities when asked
    for. selection: extension data for the client, None unless the request wanted it.
    """

    events: tuple[Event, ...]
    tokens: tuple[SampledToken, ...] = ()
    selection: Any = None


class Reply(Protocol):
    """An accepted request. Iterate once over `pieces`; closing the iterator early cancels the request at once."""

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were not computed again; known when the first piece has come."""
        ...

    @property
    def prompt_tokens(self) -> Sequence[SampledToken]:
        """With echo: the tokens of the prompt; the first one has no log-probability. Known with the first piece."""
        ...

    def pieces(self) -> AsyncGenerator[Piece, None]: ...


class Service(Protocol):
    """The engine as the dialects see it. `tenant` separates prefix caches and shares the machine fairly.

    All raise RequestError or TemplateError (the client's mistake, 400), MemoryLimitError (will never fit, 400) or
    OverloadedError (not now, 429), before anything is generated.
    """

    model_names: tuple[str, ...]
    """The first is the model's name; requests may also use the others."""
    context_length: int
    """Tokens that one request may have, prompt and answer together."""
    created: int
    """Unix seconds at which the model was loaded."""

    async def chat(self, request: ChatRequest, *, tenant: str) -> Reply: ...

    async def complete(self, request: CompletionRequest, *, tenant: str) -> Reply: ...

    async def encode_chat(self, request: ChatRequest) -> list[int]:
        """The prompt that `chat` would read."""
        ...

    async def tokenize(self, text: str) -> list[int]:
        """Control tokens written in the text are plain text."""
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...
