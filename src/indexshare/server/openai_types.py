"""What OpenAI clients send: strict types, where null is the same as absent and an unknown field is an error.

Accepted and ignored, because clients send them and nothing here depends on them: user, safety_identifier, metadata,
service_tier, prompt_cache_key, prompt_cache_retention and prompt_cache_options (the prefix cache needs no hints),
prediction (a hint for speed), store when false, stream_options.include_obfuscation, `strict` of a schema (a schema is
always enforced).

Refused with a sentence: logit_bias, functions and function_call, store when true, modalities other than text, verbosity
other than medium, suffix, best_of other than n.

The field for structured output is vLLM's of today, structured_outputs; the older guided_json, guided_regex and so on,
which vLLM itself removed, are unknown fields.
"""

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from indexshare.chat.template import EFFORTS
from indexshare.engine.sampler import MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOP_STRINGS
from indexshare.server.http import ApiError
from indexshare.server.types import OutputFormat

MAX_CHOICES = 16
MAX_MESSAGES = 4096
MAX_TOOLS = 512
MAX_OPTIONS = 1000
MAX_INTEGER = 2**31 - 1
MAX_SEED = 2**63 - 1

# The bounds are those of SamplingParams, which has the last word; here they reach the API's description.
Count = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Effort = Annotated[str, Meta(pattern=f"^({'|'.join(EFFORTS)})$")]  # unlike a Literal, the error lists what is possible
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]

_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
)


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a request: what it does not declare is refused by name."""


class StreamOptions(Strict):
    """include_usage: a last chunk with the token counts."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Extension(Strict):
    """selected: report which positions sparse attention read for each token."""

    selected: bool | None = None


class StructuredOutputs(Strict):
    """Exactly one of: a JSON schema, any JSON object, a regular expression, a Lark grammar, a list of whole answers."""

    json: dict[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=MAX_OPTIONS)] | None = None

    def output_format(self) -> OutputFormat:
        """The neutral form. Raises ApiError unless exactly one field is set."""
        options: list[OutputFormat] = []
        if self.json is not None:
            options.append(OutputFormat(kind="json_schema", definition=self.json))
        if self.json_object:
            options.append(OutputFormat(kind="json_object"))
        if self.regex is not None:
            options.append(OutputFormat(kind="regex", definition=self.regex))
        if self.grammar is not None:
            options.append(OutputFormat(kind="grammar", definition=self.grammar))
        if self.choice is not None:
            options.append(OutputFormat(kind="regex", definition=f"(?:{'|'.join(map(re.escape, self.choice))})"))
        if len(options) != 1:
            message = "structured_outputs needs exactly one of json, json_object, regex, grammar and choice"
            raise ApiError(400, message, param="structured_outputs")
        return options[0]


class GenerationBody(Strict):
    """The fields that both endpoints have. top_k: 0 or -1 keeps every token. Without `model`: the model there is."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INTEGER)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-6, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    structured_outputs: StructuredOutputs | None = None
    indexshare: Extension | None = None
    logit_bias: dict[str, Any] | None = None
    # Ignored from here on.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def wants_selection(self) -> bool:
        return self.indexshare is not None and bool(self.indexshare.selected)

    def check(self) -> None:
        """Refuse values that are well-formed and cannot be honoured (ApiError 400)."""
        if self.logit_bias:
            raise ApiError(400, "logit_bias is not supported; leave it out", param="logit_bias")
        if self.wants_selection and self.num_choices > 1:
            raise ApiError(400, "indexshare.selected needs n = 1", param="n")

    def sampling(self, max_new_tokens: int | None, logprobs: int | None) -> list[dict[str, Any]]:
        """Keyword arguments of SamplingParams for each of the n choices, only those that the client gave.

        The seeds of the choices count up from the client's; without one the service draws them.
        """
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if max_new_tokens is not None:
            given["max_new_tokens"] = max_new_tokens
        if logprobs is not None:
            given["logprobs"] = logprobs
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.seed is None:
            return [given] * self.num_choices
        return [{**given, "seed": (self.seed + index) & MAX_SEED} for index in range(self.num_choices)]


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema. strict: enforce it."""

    name: Annotated[str, Meta(pattern=r"^[^\s<>]+$", max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool. defer_loading: GLM's templates leave it out until a tool result refers to it."""

    type: Annotated[str, Meta(pattern="^function$")]
    function: Function
    defer_loading: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The tool as a template reads it: keys in a fixed order, absent ones left out."""
        function = {name: value for name, value in msgspec.structs.asdict(self.function).items() if value is not None}
        tool = {"type": self.type, "function": function}
        return tool if self.defer_loading is None else {**tool, "defer_loading": self.defer_loading}


class FunctionName(Strict):
    """The function to call."""

    name: str


class NamedTool(Strict):
    """A tool_choice that names one function."""

    type: Annotated[str, Meta(pattern="^function$")]
    function: FunctionName


class JsonSchema(Strict):
    """The schema of a response_format, and a name and a description for people."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer must be."""

    type: Annotated[str, Meta(pattern="^(text|json_object|json_schema)$")]
    json_schema: JsonSchema | None = None

    def output_format(self) -> OutputFormat | None:
        """The neutral form, None for text. Raises ApiError when the schema is missing."""
        if self.type == "json_object":
            return OutputFormat(kind="json_object")
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.schema is None:
            message = "response_format of type json_schema needs json_schema.schema"
            raise ApiError(400, message, param="response_format.json_schema.schema")
        return OutputFormat(kind="json_schema", definition=self.json_schema.schema)


class Thinking(Strict):
    """Z.ai's way to say it. budget_tokens: tokens of reasoning after which the thinking is closed."""

    type: Annotated[str, Meta(pattern="^(enabled|disabled)$")]
    budget_tokens: Count | None = None
    clear_thinking: bool | None = None


class TemplateArguments(Strict):
    """The variables of the chat template that a client may set; any other could change what the template is."""

    enable_thinking: bool | None = None
    clear_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class ChatBody(GenerationBody, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    reasoning_effort: Effort | None = None
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    clear_thinking: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None
    tool_choice: Annotated[str, Meta(pattern="^(auto|none|required)$")] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    # Refused unless they ask for what happens anyway.
    functions: list[Any] | None = None
    function_call: Any = None
    store: bool | None = None
    modalities: list[str] | None = None
    verbosity: str | None = None
    # Ignored from here on.
    prediction: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    def check(self) -> None:
        """Refuse values that are well-formed and cannot be honoured (ApiError 400)."""
        super().check()
        refusals = (
            ("functions", self.functions, "is not supported; use tools"),
            ("function_call", self.function_call, "is not supported; use tool_choice"),
            ("store", self.store, "must be false: nothing is stored"),
            ("modalities", self.modalities not in (None, ["text"]), 'must be ["text"]: this is a text model'),
            ("verbosity", self.verbosity not in (None, "medium"), 'must be "medium"; ask for length in the prompt'),
            ("top_logprobs", self.top_logprobs is not None and not self.logprobs, "needs logprobs: true"),
        )
        for name, is_refused, message in refusals:
            if is_refused:
                raise ApiError(400, f"{name} {message}", param=name)


class CompletionBody(GenerationBody, kw_only=True):
    """The body of /v1/completions. max_tokens 0: only score the prompt, with echo."""

    prompt: str | list[TokenId | str | list[TokenId]]
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_INTEGER)] | None = None
    echo: bool | None = None
    logprobs: Logprobs | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Refuse values that are well-formed and cannot be honoured (ApiError 400)."""
        super().check()
        if self.suffix:
            raise ApiError(400, "suffix is not supported; leave it out", param="suffix")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ApiError(400, "best_of must be equal to n", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens must be 1 or more, or 0 with echo: true", param="max_tokens")
