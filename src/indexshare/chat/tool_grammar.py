r"""GLM tool calls as a grammar: Lark text in llguidance's dialect, in which `<tool_call>` is the control token.

    TEXT? <tool_call>NAME<arg_key>K</arg_key><arg_value>V</arg_value>...</tool_call> ...

An exact tool is called as its schema says, and every call that the grammar lets through is read by `EventParser` into
arguments that are valid under that schema. Arguments come in the order of the schema, each at most once; keys that the
schema does not name never come, whatever additionalProperties says. What the parser reads as text (every argument whose
schema names the type string) is raw text, the rest is JSON. A string argument may have enum, const, pattern, minLength
and maxLength; `format` is not enforced for it (inside JSON values it is).

Not expressible, RequestError: parameters with keywords beside properties, required, additionalProperties and
definitions (anyOf at the top, patternProperties, ...); a string argument under allOf with several parts, under oneOf
with overlapping parts, with not or if, or with enum beside pattern or a length. JSON numbers inside arrays and objects
may exceed the range of fp64 (1e999), which the parser then passes on as text.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from indexshare.chat.schema import ArgumentTypes
from indexshare.errors import RequestError

MAX_TOOLS = 512
WHITESPACE = r"( |\r?\n[ \t]{0,32})"
"""Between the values of a JSON document: a space, or a new line and its indentation. A weak model fills its answer with
white space where it may."""

_MAX_REFERENCES = 16
_NAME = re.compile(r"[^\s<>]{1,256}")  # what the parser reads as a name
_TAG = re.compile(r"</?(?:think|tool_call|arg_key|arg_value)>")
_ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly $comment $schema $id $defs definitions".split()
)
_COMBINATIONS = frozenset(
    "anyOf oneOf allOf not if then else $ref $dynamicRef enum const dependentRequired dependentSchemas dependencies "
    "patternProperties propertyNames minProperties maxProperties unevaluatedProperties".split()
)
_STRING_RULES = frozenset({"pattern", "minLength", "maxLength"})

# A pattern of a JSON schema (ECMAScript) as llguidance reads it between slashes: \d and \w are ASCII.
_REWRITTEN = {"/": r"\/", "\n": r"\n", r"\d": "[0-9]", r"\D": "[^0-9]", r"\w": "[0-9A-Za-z_]", r"\W": "[^0-9A-Za-z_]"}
_ANY_TEXT = "/(?s:.*)/"
_PARTS = r"""
CALL_SPACE: /[ \n]{1,2}/
CALL_TEXT: /(?s:.+)/
ANY_KEY: /[^\s<>]([^<>]{0,200}[^\s<>])?/
ANY_VALUE: /(?s:.*)/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableTool:
    """A tool as far as calls are concerned. strict: its calls must follow the schema `parameters`."""

    name: str
    parameters: Any
    strict: bool


def callable_tools(tools: Sequence[Mapping[str, Any]], *, name: str | None = None) -> list[CallableTool]:
    """Read tools (OpenAI form or bare functions); with `name` only that one.

    Raises RequestError for none, too many, a malformed one, a name that is given twice or that no call could carry.
    """
    if not tools or len(tools) > MAX_TOOLS:
        raise RequestError(f"tool calls need 1 to {MAX_TOOLS} tools, not {len(tools)}")
    table: dict[str, CallableTool] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError('a tool needs a function name: {"type": "function", "function": {"name": ..., ...}}')
        tool_name = function["name"]
        if not _NAME.fullmatch(tool_name):
            raise RequestError(f"tool name {tool_name!r:.80}: use 1 to 256 characters without white space, < and >")
        if tool_name in table:
            raise RequestError(f"two tools are named {tool_name!r}")
        parameters = function.get("parameters")
        table[tool_name] = CallableTool(
            name=tool_name,
            parameters={} if parameters is None else parameters,
            strict=bool(tool.get("strict") or function.get("strict")),
        )
    if name is not None and name not in table:
        raise RequestError(f"tool_choice names {name!r}, which is not one of the tools")
    return [tool for tool in table.values() if name in (None, tool.name)]


def tool_call_grammar(
    tools: Sequence[CallableTool],
    *,
    exact: Collection[str],
    required: bool,
    parallel: bool = True,
    answer: str | None = None,
) -> str:
    """The grammar of a reply that calls these tools. exact: names of those whose calls follow their schema.

    required: calls and nothing before them but white space, at least one; else free text, then calls. Not parallel: at
    most one call. answer: a JSON schema as text; then the reply is either JSON under it, or calls.
    Raises RequestError, which names the tool, where a schema cannot be expressed.
    """
    many = "+" if parallel else ""
    start = f"CALL_SPACE? call{many}" if required else f"CALL_TEXT? {'call*' if parallel else 'call?'}"
    if answer is not None:
        start = f"answer | CALL_SPACE? call{many}\nanswer: %json {answer}"
    names = [f"call_{index}" for index in range(len(tools))]
    lines = [f"start: {start}", f"call: <tool_call> ({' | '.join(names)}) </tool_call>"]
    for rule, tool in zip(names, tools, strict=True):
        if tool.name in exact:
            lines += _ExactCall(tool).lines(rule)
        else:
            lines.append(
                f"{rule}: {_literal(tool.name)} (<arg_key> ANY_KEY </arg_key> <arg_value> ANY_VALUE </arg_value>)*"
            )
    return "\n".join(lines) + _PARTS


class _Choice(NamedTuple):
    """A terminal of the grammar; where it is one `text` only, what the schema means by that (a string or None)."""

    terminal: str
    text: str | None = None
    value: str | None = None


_NULL = _Choice('"null"', "null")


class _ExactCall:
    """The rules for calls of one tool that follow its schema."""

    def __init__(self, tool: CallableTool) -> None:
        self._tool = tool
        schema = tool.parameters
        if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
            raise self._error('its parameters must be a schema of the type "object"')
        if found := _COMBINATIONS & set(schema):
            raise self._error(f"{min(found)!r} at the top of its parameters is not supported")
        self._schema = schema
        self._types = ArgumentTypes([{"name": tool.name, "parameters": schema}])

    def lines(self, rule: str) -> list[str]:
        """The rule of a whole call's inside, then one for each argument."""
        properties, required = self._arguments()
        inside, lines = [_literal(self._tool.name)], []
        for index, (key, schema) in enumerate(properties.items()):
            if not key.strip() or key != key.strip() or _TAG.search(key):
                raise self._error(f"no call could carry an argument named {key!r:.80}")
            value = f"{rule}_{index}"
            argument = f"<arg_key> {_literal(key)} </arg_key> <arg_value> {value} </arg_value>"
            inside.append(argument if key in required else f"({argument})?")
            lines += self._value(key, schema, value)
        return [f"{rule}: {' '.join(inside)}", *lines]

    def _arguments(self) -> tuple[dict[str, Any], Collection[str]]:
        properties, required = self._schema.get("properties", {}), self._schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
            raise self._error("'properties' must be an object and 'required' a list")
        others = self._schema.get("additionalProperties", True)
        unnamed = [key for key in required if key not in properties]
        if unnamed and (others is False or not all(isinstance(key, str) for key in unnamed)):
            raise self._error(f"it requires {unnamed[0]!r:.80}, which is not in its properties")
        return {**properties, **dict.fromkeys(unnamed, others)}, required

    def _value(self, key: str, schema: object, rule: str) -> list[str]:
        # The parser decides what is raw text, so it is asked: of raw text it keeps the quotation marks.
        is_raw = self._types.read(self._tool.name, key, '"x"') == ('"x"', None)
        if not is_raw:
            if (
                isinstance(schema, Mapping)
                and schema.get("type") == "number"
                and set(schema) <= {"type", *_ANNOTATIONS}
            ):
                return [f"{rule}: NUMBER"]
            return [f"{rule}: %json {self._inline(key, schema)}"]
        terminals = dict.fromkeys(
            choice.terminal for choice in self._raw(key, schema, 0) if self._can_carry(key, choice)
        )
        if not terminals:
            raise self._error(f"argument {key!r}: no text is valid under its schema")
        return [f"{rule}: {rule.upper()}", f"{rule.upper()}: {' | '.join(terminals)}"]

    def _can_carry(self, key: str, choice: "_Choice") -> bool:
        """Whether the parser reads an exact text as what the schema means by it."""
        if choice.text is None:
            return True
        read = self._types.read(self._tool.name, key, choice.text)
        return read == (choice.value, None) and "</arg_value>" not in choice.text

    def _inline(self, key: str, schema: object) -> str:
        """The schema of one argument as a document of its own, with the definitions that it may refer to."""
        if not isinstance(schema, Mapping | bool):
            raise self._error(f"argument {key!r}: its schema must be an object or a boolean")
        inline = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
        if '"$ref"' in json.dumps(inline):
            inline |= {name: self._schema[name] for name in ("$defs", "definitions") if name in self._schema}
        return json.dumps({**inline, "x-guidance": {"whitespace_pattern": WHITESPACE}})

    def _raw(self, key: str, schema: object, depth: int) -> list["_Choice"]:
        """The alternatives for the raw text of an argument that is a string or None under the schema."""
        if isinstance(schema, bool):
            return [_Choice(_ANY_TEXT)] if schema else []
        if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
            raise self._error(f"argument {key!r}: its schema is malformed or refers to itself")
        rules = schema.keys() - _ANNOTATIONS
        if combined := rules & (_COMBINATIONS - {"enum", "const"}):
            return self._combined(key, schema, min(combined), rules, depth)
        named = schema.get("type", ["string", "null"])
        types = [named] if isinstance(named, str) else named
        is_text, is_null = "string" in types, "null" in types
        for keyword in rules & {"enum", "const"}:
            if beside := rules & {"enum", "const", *_STRING_RULES} - {keyword}:
                raise self._error(f"argument {key!r}: {keyword!r} beside {min(beside)!r} is not supported for text")
            values = schema["enum"] if keyword == "enum" else [schema["const"]]
            if not isinstance(values, list):
                raise self._error(f"argument {key!r}: enum must be a list")
            texts = [_Choice(_literal(value), value, value) for value in values if is_text and isinstance(value, str)]
            return texts + ([_NULL] if is_null and None in values else [])
        texts = [_Choice(self._text(key, schema))] if is_text else []
        return texts + ([_NULL] if is_null else [])

    def _combined(
        self, key: str, schema: Mapping[str, Any], keyword: str, rules: Collection[str], depth: int
    ) -> list["_Choice"]:
        """`_raw` of a schema that refers to another or is made of others, and of nothing else."""
        if beside := set(rules) - {keyword}:
            raise self._error(f"argument {key!r}: {keyword!r} beside {min(beside)!r} is not supported for text")
        if keyword == "$ref":
            return self._raw(key, self._target(key, schema["$ref"]), depth + 1)
        options = schema[keyword] if isinstance(schema[keyword], list) else []
        choices = [self._raw(key, option, depth + 1) for option in options]
        joined = [choice for group in choices for choice in group]
        if keyword == "anyOf" or (keyword in ("allOf", "oneOf") and len(options) == 1):
            return joined
        if keyword == "oneOf" and joined.count(_NULL) <= 1:
            texts = [choice for choice in joined if choice != _NULL]
            is_distinct = len({choice.text for choice in texts}) == len(texts) and None not in {c.text for c in texts}
            if is_distinct or sum(any(choice != _NULL for choice in group) for group in choices) <= 1:
                return joined
        raise self._error(f"argument {key!r}: this {keyword!r} is not supported for text")

    def _target(self, key: str, reference: object) -> object:
        target: object = self._schema
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise self._error(f"argument {key!r}: $ref must point into the schema (#/$defs/...)")
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        return target

    def _text(self, key: str, schema: Mapping[str, Any]) -> str:
        """A terminal for text of a length and with a pattern."""
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        for bound in (low, high):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
                raise self._error(f"argument {key!r}: minLength and maxLength must be integers of at least 0")
        text = f"/(?s:.{{{low},{'' if high is None else high}}})/" if low or high is not None else _ANY_TEXT
        if "pattern" not in schema:
            return text
        if not isinstance(schema["pattern"], str):
            raise self._error(f"argument {key!r}: pattern must be text")
        pattern = _search(schema["pattern"])
        return pattern if text == _ANY_TEXT else f"({text} & {pattern})"

    def _error(self, problem: str) -> RequestError:
        return RequestError(f"tool {self._tool.name!r} cannot be enforced: {problem}")


def _literal(text: str) -> str:
    return json.dumps(text)


def _search(pattern: str) -> str:
    """A terminal for text in which a JSON schema's pattern is found, which need not be at an end.

    With anchors and top-level alternatives it is narrower: "^a|b$" becomes a or b alone.
    """
    end = re.search(r"(?<!\\)(?:\\\\)*(\$)$", pattern)
    body = pattern[pattern.startswith("^") : end.start(1) if end else None]
    body = re.sub(r"\\.|/|\n", lambda match: _REWRITTEN.get(match[0], match[0]), body, flags=re.DOTALL)
    before = "" if pattern.startswith("^") else "(?s:.*)"
    after = "" if end else "(?s:.*)"
    return f"/{before}({body}){after}/"
