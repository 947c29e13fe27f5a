"""What agents put into a system prompt for others than the model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_HEADER_LINES = re.compile(r"(?:\s*x-anthropic-[a-z-]+:[^\n]*(?:\n|\Z))+\n*")


def without_header_lines(system: str) -> str:
    """`system` without the header lines (`x-anthropic-...: ...`) at its start.

    Claude Code begins its system prompt with such a line, whose hash is another one in every request. It is meant for
    a billing system, and left in the prompt it would make every prefix a new one. Lines further down stay.
    """
    header = _HEADER_LINES.match(system)
    return system[header.end() :] if header else system


def stable(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`messages` with such lines removed from the first one, if it is a system message with text."""
    if not messages or messages[0].get("role") not in ("system", "developer"):
        return list(messages)
    content = messages[0].get("content")
    if not isinstance(content, str) or (rest := without_header_lines(content)) == content:
        return list(messages)
    return [*([{**messages[0], "content": rest}] if rest else []), *messages[1:]]
