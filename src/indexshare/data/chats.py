"""Conversations from JSON lines, as supervised fine-tuning reads them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indexshare.chat.types import Message
from indexshare.data.files import is_json_lines, read_json_lines, source_files
from indexshare.errors import RequestError, TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages, the tools the model had at hand as the chat template reads them, and `path:line`."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    source: str = ""


def read_chats(sources: Sequence[str | os.PathLike[str]]) -> Iterator[Conversation]:
    """The conversations of JSON lines files (also .gz) and of all such files in folders, one at a time.

    A line is `{"messages": [...], "tools": [...]}` in the form of the OpenAI chat API; `tools` may be left out, other
    fields are ignored. Raises TrainingError, naming file and line, for messages that are not valid, for a conversation
    without an assistant's message, in which there is nothing to learn, and for a source without JSON lines.
    """
    for source in sources:
        files = [file for file in source_files(source) if is_json_lines(file)]
        if not files:
            raise TrainingError(f"{source} has no JSON lines (.jsonl, .ndjson, .jsonl.gz) with conversations")
        for file in files:
            for number, value in read_json_lines(file):
                yield _conversation(value, file, number)


def _conversation(value: object, file: Path, number: int) -> Conversation:
    where = f"{file}:{number}"
    if not isinstance(value, Mapping) or not isinstance(value.get("messages"), list):
        raise TrainingError(f'{where} needs a list "messages"')
    try:
        messages = tuple(Message.from_dict(message) for message in value["messages"])
    except RequestError as error:
        raise TrainingError(f"{where}: {error}") from error
    if not any(message.role == "assistant" for message in messages):
        raise TrainingError(f"{where} has no message of role 'assistant': there is nothing to learn from it")
    tools = value.get("tools") or []
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise TrainingError(f'{where}: tools must be a list of {{"type": "function", "function": {{"name": ...}}}}')
    return Conversation(messages=messages, tools=tuple(tools), source=where)


def _is_tool(value: object) -> bool:
    function = value.get("function") if isinstance(value, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str) and bool(function["name"])
