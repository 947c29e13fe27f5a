"""Conversations to token ids through a Jinja chat template.

`encode_chat` is the safe way: text that callers supply can never become a control token, whatever it contains.
"""

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from indexshare.chat.sandbox import Budget, SandboxEnvironment, render
from indexshare.chat.tokenizer import Tokenizer
from indexshare.chat.types import Message
from indexshare.errors import RequestError, TemplateError

# Work a template may do: a fixed part and a part per character of its input (loops may pass over the input many times).
_BASE_WORK = 4 * 1024 * 1024
_WORK_PER_CHAR = 256

# Words for an effort, and what each means to a template that does not know it: the first that the template knows.
_EFFORTS: dict[str, tuple[str, ...]] = {
    "minimal": ("low", "high"),
    "low": ("high",),
    "medium": ("high",),
    "high": (),
    "xhigh": ("max",),
    "max": (),
}
EFFORTS = ("none", *_EFFORTS)
Conversation = Sequence[Message | Mapping[str, Any]]


def resolve_effort(reasoning_effort: str | None, enable_thinking: bool, source: str) -> tuple[str | None, bool]:
    """(effort for the template with this source, thinking on). "none" turns thinking off, None asks for nothing.

    A word that the template compares with, which stands quoted in its source, is passed on: GLM-5.3 knows "low", "high"
    and "max". GLM-5.2 knows "high" and silently reads any other word as Max, so that for it "minimal", "low" and
    "medium" become "high", and "xhigh" becomes "max". RequestError for a word that is none of these.
    """
    if reasoning_effort is None or reasoning_effort == "none":
        return None, enable_thinking and reasoning_effort is None
    if reasoning_effort not in _EFFORTS:
        raise RequestError(
            f"unknown reasoning_effort {reasoning_effort!r}; use one of {', '.join(repr(effort) for effort in EFFORTS)}"
        )
    words = (reasoning_effort, *_EFFORTS[reasoning_effort])
    return next((word for word in words if re.search(f"(['\"]){word}\\1", source)), words[-1]), enable_thinking


class ChatTemplate:
    """A compiled chat template. `source` is its text, GLM-5.2's format when none is given.

    A template is a program from whoever made the checkpoint. It runs in a sandbox with `seconds` of wall time and a
    work limit in proportion to the conversation. Never build one from a request.
    """

    def __init__(self, source: str | None = None, *, seconds: float = 10.0) -> None:
        self.source = default_source() if source is None else source
        self._seconds = seconds
        self._template = _environment().compile_source(self.source)

    @staticmethod
    def from_directory(path: str | Path) -> "ChatTemplate":
        """The template a checkpoint carries (chat_template.jinja, else tokenizer_config.json), else the default."""
        directory = Path(path)
        try:
            if (file := directory / "chat_template.jinja").is_file():
                return ChatTemplate(file.read_text(encoding="utf-8"))
            if (file := directory / "tokenizer_config.json").is_file():
                source = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
                if isinstance(source, list):  # several named templates
                    source = next((item["template"] for item in source if item.get("name") == "default"), None)
                if source is not None:
                    return ChatTemplate(source)
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise TemplateError(f"cannot read the chat template in {directory}: {error}") from error
        return ChatTemplate()

    def render(
        self,
        messages: Conversation,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        enable_thinking: bool = True,
        clear_thinking: bool = True,
        add_generation_prompt: bool = True,
        transform: Callable[[str], str] | None = None,
    ) -> str:
        """The prompt as text. Not safe to tokenize with control tokens: see `encode_chat`.

        clear_thinking: drop reasoning before the last user message (False keeps all of it, and the prefix cache valid).
        transform: applied to every string the caller supplied, dictionary keys included, before the template sees it.
        Raises RequestError for a bad conversation and TemplateError when the template fails or exceeds its limits.
        """
        effort, thinking = resolve_effort(reasoning_effort, enable_thinking, self.source)
        copy = _PlainCopy(transform)
        try:
            plain = [copy.value(_message_dict(message)) for message in messages]
            plain_tools = [copy.value(_tool_dict(tool)) for tool in tools] if tools else None
        except RecursionError as error:
            raise RequestError("the messages or tools are nested too deeply") from error
        variables: dict[str, Any] = {
            "messages": plain,
            "tools": plain_tools,
            "enable_thinking": thinking,
            "clear_thinking": clear_thinking,
            "add_generation_prompt": add_generation_prompt,
        }
        if effort is not None:
            variables["reasoning_effort"] = effort
        return render(self._template, variables, Budget(_BASE_WORK + _WORK_PER_CHAR * copy.size, self._seconds))


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Conversation,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_effort: str | None = None,
    enable_thinking: bool = True,
    clear_thinking: bool = True,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation. Arguments and errors as for `ChatTemplate.render`.

    Only the template's own text yields control tokens. Each control token's name inside a caller's string is replaced
    by a random word before rendering, and put back as ordinary text afterwards, so decoding gives the literal text.
    """
    names = sorted(tokenizer.control_ids, key=len, reverse=True)
    nonce = secrets.token_hex(16)
    name_pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
    word_pattern = re.compile(f"Z{nonce}x([0-9]+)Z")
    words = {name: f"Z{nonce}x{index}Z" for index, name in enumerate(names)}
    text = template.render(
        messages,
        tools=tools,
        reasoning_effort=reasoning_effort,
        enable_thinking=enable_thinking,
        clear_thinking=clear_thinking,
        add_generation_prompt=add_generation_prompt,
        transform=lambda string: name_pattern.sub(lambda match: words[match[0]], string),
    )
    pieces = tokenizer.split_control(text)
    return tokenizer.encode_pieces(
        [(word_pattern.sub(lambda match: names[int(match[1])], piece), name) for piece, name in pieces]
    )


@cache
def default_source() -> str:
    """The text of our own template for GLM-5.2's format."""
    return resources.files("indexshare.chat").joinpath("glm52.jinja").read_text(encoding="utf-8")


@cache
def _environment() -> SandboxEnvironment:
    return SandboxEnvironment()


def _message_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    message = message if isinstance(message, Message) else Message.from_dict(message)
    data = message.to_dict()
    content = data["content"]
    mixed = message.role == "assistant" and message.reasoning_content is None and isinstance(content, str)
    if mixed and "</think>" in content:
        # The templates of this family make this split themselves, but would not see it in text whose control tokens
        # are replaced by `encode_chat`.
        data["reasoning_content"] = content.split("</think>")[0].split("<think>")[-1]
        data["content"] = content.split("</think>")[-1]
    return data


def _tool_dict(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as `{"type": "function", "function": {...}}` or its bare inner object; checked for a name."""
    if not isinstance(tool, Mapping):
        raise RequestError(f"a tool must be an object, not {type(tool).__name__}")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError('a tool needs a function name: {"type": "function", "function": {"name": ..., ...}}')
    if function is tool:
        return dict(tool)
    if unknown := set(tool) - {"type", "function", "strict", "defer_loading"}:
        raise RequestError(f"unknown key {min(map(str, unknown))!r} in a tool; what describes it belongs in 'function'")
    outer = {key: tool[key] for key in ("strict", "defer_loading") if key in tool}
    return {"type": "function", "function": {**function, **outer}}


class _PlainCopy:
    """Copies values into exact JSON types, so that a template meets no object with methods of its own.

    `size` counts the characters and values copied so far.
    """

    def __init__(self, transform: Callable[[str], str] | None) -> None:
        self._transform = transform
        self.size = 0

    def value(self, value: object) -> Any:
        """A plain copy. Raises RequestError for what JSON cannot hold."""
        self.size += 1
        if isinstance(value, str):
            self.size += len(value)
            return self._transform(str(value)) if self._transform else str(value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float) and math.isfinite(value):
            return float(value)
        if isinstance(value, Mapping):
            if unknown := [key for key in value if not isinstance(key, str)]:
                raise RequestError(f"the key {unknown[0]!r} in a message or tool is not text")
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        raise RequestError(f"a message or tool holds {value!r:.80}, which is not a JSON value")
