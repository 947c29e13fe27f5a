"""Calls that the grammar lets through are calls that the parser reads and the tool's schema accepts.

The grammar is text; here it runs as the engine runs it, by random walks over the tokens that are allowed.
"""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import indexshare
from indexshare.chat.parser import EventParser
from indexshare.chat.tokenizer import StreamDecoder, Tokenizer
from indexshare.chat.tool_grammar import callable_tools, tool_call_grammar
from indexshare.chat.types import Event, Text, ToolCallEvent
from indexshare.engine.grammar import GuideCompiler
from indexshare.engine.guide import Guide
from indexshare.errors import RequestError

STRING = {"type": "string"}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where"},
        "unit": {"enum": ["celsius", "fahrenheit", "°", ""]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
STRINGS = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": r"^[A-Z]{2}/\d+$"},
        "found": {"type": "string", "pattern": "a|b", "maxLength": 5},
        "short": {"type": "string", "minLength": 2, "maxLength": 4},
        "note": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "null"}]},
        "mode": {"oneOf": [{"const": "read"}, {"const": "wri/te"}, {"type": "null"}]},
        "either": {"type": ["string", "null"], "enum": ["null", "x", 5]},
        "mixed": {"anyOf": [{"type": "string", "enum": ["1", "one"]}, {"type": "integer"}]},
        "one": {"allOf": [{"$ref": "#/$defs/name"}]},
    },
    "required": ["code", "short", "either", "mixed"],
    "$defs": {"name": {"type": "string", "minLength": 1, "maxLength": 3}},
}
VALUES = {
    "type": "object",
    "properties": {
        "amount": {"type": "number"},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 3},
        "tree": {"$ref": "#/$defs/tree"},
        "flag": {"type": ["boolean", "null"]},
        "size": {"type": "object", "properties": {"w": {"type": "integer"}, "h": STRING}, "required": ["w"]},
        "kind": {"enum": [1, 2.5, None, [1], {"a": "b"}]},
        "nothing": {"const": None},
    },
    "required": ["tags", "amount", "later"],
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"leaf": {"type": "integer"}, "next": {"$ref": "#/$defs/tree"}},
            "required": ["leaf"],
            "additionalProperties": False,
        }
    },
    "additionalProperties": {"type": "string", "maxLength": 9},
}


def tool(name: str, parameters: object = None, **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [
    tool("weather", WEATHER, strict=True),
    tool("weather_strings", STRINGS, strict=True),
    {"name": "values", "parameters": VALUES, "strict": True},  # a bare function
    tool("now", strict=True),
]
SCHEMAS = {"weather": WEATHER, "weather_strings": STRINGS, "values": VALUES, "now": {"maxProperties": 0}}


@pytest.fixture(scope="module")
def nano() -> GuideCompiler:
    tokenizer = Tokenizer.from_directory(Path(indexshare.__file__).parent / "models" / "nano")
    return GuideCompiler(tokenizer, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def small(tokenizer: Tokenizer) -> GuideCompiler:
    """A tokenizer whose merges hold pieces of the tags' names."""
    return GuideCompiler(tokenizer, tokenizer.vocab_size)


def allowed_ids(guide: Guide, size: int) -> list[int]:
    allowed = guide.allowed()
    if allowed is None:
        return list(range(size))
    return [allowed] if isinstance(allowed, int) else allowed.nonzero()[:, 0].tolist()


def walk(compiler: GuideCompiler, guide: Guide, seed: int, *, eager: int = 40) -> str:
    """Text of one random reply. After `eager` tokens it hurries towards an end: tags, brackets, stop tokens."""
    tokenizer, random_numbers = compiler.vocabulary.tokenizer, random.Random(seed)
    decoder, text = StreamDecoder(tokenizer), ""
    tags = sorted(set(tokenizer.control_ids.values()) - set(tokenizer.stop_ids))
    closers = [token_id for mark in ('"', "]", "}", '"]') for token_id in tokenizer.encode(mark)]
    for position in range(2000):
        ids = allowed_ids(guide, tokenizer.vocab_size)
        permitted = set(ids)
        assert ids
        hurry = position >= eager
        if (stops := permitted.intersection(tokenizer.stop_ids)) and (
            hurry or stops == permitted or random_numbers.random() < 0.3
        ):
            guide.accept(min(stops))
            return text + decoder.finish()
        for kind in (tags, closers):
            if (some := [i for i in kind if i in permitted]) and (hurry or random_numbers.random() < 0.3):
                ids = [i for i in some if tokenizer.token_bytes(i).startswith(b"</")] or some
                break
        chosen = random_numbers.choice([i for i in ids if i not in stops])
        guide.accept(chosen)
        text += decoder.push(chosen)
    raise AssertionError(f"no end in sight: {text[-200:]!r}")


def read(text: str, tools: list[dict[str, Any]] = TOOLS, cut: int = 7) -> list[Event]:
    parser = EventParser(tools, thinking=False)
    events = [event for start in range(0, len(text), cut) for event in parser.feed(text[start : start + cut])]
    return events + parser.finish()


def check_calls(events: list[Event], text: str) -> list[ToolCallEvent]:
    calls = [event for event in events if isinstance(event, ToolCallEvent)]
    assert {type(event).__name__ for event in events} <= {"Text", "ToolCallEvent", "Done"}, (text, events)  # no Warning
    for call in calls:
        jsonschema.validate(call.arguments, SCHEMAS[call.name])
    return calls


@pytest.mark.parametrize("which", ["nano", "small"])
@pytest.mark.parametrize("required", [True, False])
def test_every_call_is_valid(which: str, required: bool, request: pytest.FixtureRequest) -> None:
    compiler = request.getfixturevalue(which)
    compiled = compiler.tool_calls(TOOLS, required=required)
    names = set()
    for seed in range(40):
        text = walk(compiler, compiled.guide(compiler.vocabulary.tokenizer.stop_ids), seed, eager=30 + seed)
        calls = check_calls(read(text), text)
        names.update(call.name for call in calls)
        assert calls or not required
    assert names == set(SCHEMAS) if required else len(names) > 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_tool_is_the_only_one(nano: GuideCompiler, name: str) -> None:
    compiled = nano.tool_calls(TOOLS, required=False, name=name, parallel=False)
    for seed in range(15):
        text = walk(nano, compiled.guide(nano.vocabulary.tokenizer.stop_ids), seed, eager=60)
        assert [call.name for call in check_calls(read(text), text)] == [name]


def follows(compiler: GuideCompiler, guide: Guide, text: str) -> bool:
    """Whether the guide allows `text`, token by token, and then an end."""
    tokenizer = compiler.vocabulary.tokenizer
    for token_id in [*tokenizer.encode(text, allow_control=True), tokenizer.stop_ids[-1]]:
        if token_id not in allowed_ids(guide, tokenizer.vocab_size):
            return False
        guide.accept(token_id)
    return True


CALL = (
    "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value>"
    "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
)


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("", {"auto", "one"}),
        ("It is sunny, as <b>html</b>.", {"auto", "one"}),
        (CALL, {"auto", "one", "required", "required one"}),
        ("\n" + CALL, {"auto", "one", "required", "required one"}),
        ("Let me look." + CALL, {"auto", "one"}),
        (CALL + "<tool_call>now</tool_call>", {"auto", "required"}),
        (CALL.replace("weather", "wether"), set()),
        (CALL.replace(">3<", ">30<"), set()),
        (CALL.replace("days", "nights"), set()),
        ("<tool_call>weather</tool_call>", set()),
        ("<tool_call>now<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>", set()),
        (CALL.removesuffix("</tool_call>"), set()),
    ],
)
def test_what_each_choice_allows(nano: GuideCompiler, text: str, choices: set[str]) -> None:
    options = {
        "auto": {"required": False},
        "one": {"required": False, "parallel": False},
        "required": {"required": True},
        "required one": {"required": True, "parallel": False},
    }
    stop_ids = nano.vocabulary.tokenizer.stop_ids
    guides = {choice: nano.tool_calls(TOOLS, **given).guide(stop_ids) for choice, given in options.items()}
    assert {choice for choice, guide in guides.items() if follows(nano, guide, text)} == choices


def test_a_tag_spelled_in_plain_tokens_ends_nothing(nano: GuideCompiler, small: GuideCompiler) -> None:
    """The parser reads text, so a value must not hold its own end, nor free text the start of a call."""
    values = '<tool_call>values<arg_key>amount</arg_key><arg_value>1</arg_value><arg_key>tags</arg_key><arg_value>["'
    city = "<tool_call>weather<arg_key>city</arg_key><arg_value>"
    for compiler in (nano, small):
        tokenizer = compiler.vocabulary.tokenizer
        compiled = compiler.tool_calls(TOOLS, required=False)
        for before, spelled, is_refused in (
            (values, "</arg_value>", True),
            (city, "</arg_value>", True),
            (city, "a < b </arg_value", False),
            (city, "<tool_call>now</tool_call>", False),
            ("see ", "<tool_call>now", True),
            ("see ", "</arg_value>", False),
        ):
            for ids in (tokenizer.encode(spelled), [tokenizer.encode(letter)[0] for letter in spelled]):
                guide = compiled.guide(tokenizer.stop_ids)
                for token_id in tokenizer.encode(before, allow_control=True):
                    guide.accept(token_id)
                refused = False
                for token_id in ids:
                    refused = refused or token_id not in allowed_ids(guide, tokenizer.vocab_size)
                    if not refused:
                        guide.accept(token_id)
                assert refused == is_refused, (before, spelled, ids)


def test_a_tool_that_is_not_strict_has_a_known_name_and_tags(nano: GuideCompiler) -> None:
    tools = [tool("loose", {"type": "object", "properties": {"a": {"not": {}}}}), tool("weather", WEATHER, strict=True)]
    any_arguments = "<tool_call>loose<arg_key>b c</arg_key><arg_value>{1]</arg_value></tool_call>"
    for required in (True, False):  # its schema cannot be expressed, so that not even "required" enforces it
        compiled = nano.tool_calls(tools, required=required)
        stop_ids = nano.vocabulary.tokenizer.stop_ids
        assert follows(nano, compiled.guide(stop_ids), any_arguments)
        assert follows(nano, compiled.guide(stop_ids), CALL)
        assert not follows(nano, compiled.guide(stop_ids), any_arguments.replace("loose", "lose"))
        assert not follows(nano, compiled.guide(stop_ids), CALL.replace(">3<", ">30<"))
    event = read(any_arguments, tools)[0]
    assert isinstance(event, ToolCallEvent) and event.arguments == {"b c": "{1]"}
    # Without "strict" and without "required" no schema is enforced.
    free = nano.tool_calls([tool("weather", WEATHER)], required=False)
    assert follows(nano, free.guide(stop_ids), CALL.replace(">3<", ">30<"))


def test_text_before_a_call_stays_text(nano: GuideCompiler) -> None:
    guide = nano.tool_calls(TOOLS, required=False).guide(nano.vocabulary.tokenizer.stop_ids)
    assert follows(nano, guide, "Let me look." + CALL)
    events = read("Let me look." + CALL)
    assert "".join(event.text for event in events if isinstance(event, Text)) == "Let me look."


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "string"}, 'type "object"'),
        ([], "tool 't' must be an object"),
        ({"type": "object", "anyOf": []}, "'anyOf' at the top"),
        ({"type": "object", "properties": []}, "'properties' must be an object"),
        ({"properties": {}, "required": ["x"], "additionalProperties": False}, "requires 'x'"),
        ({"properties": {}, "required": [5]}, "requires 5"),
        ({"properties": {" a": STRING}}, "' a'"),
        ({"properties": {"</arg_key>": STRING}}, "no call could carry"),
        (
            {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"anyOf": [STRING, {"$ref": "#/$defs/a"}]}}},
            "refers to itself",
        ),
        ({"properties": {"a": {"type": "string", "not": {"const": "x"}}}}, "'not'"),
        ({"properties": {"a": {"allOf": [STRING, {"maxLength": 3}]}}}, "'allOf'"),
        ({"properties": {"a": {"oneOf": [STRING, {"type": "string", "maxLength": 3}]}}}, "'oneOf'"),
        ({"properties": {"a": {"type": "string", "enum": ["ab"], "maxLength": 1}}}, "beside 'maxLength'"),
        ({"properties": {"a": {"enum": ["</arg_value>"]}}}, "no text is valid"),
        ({"properties": {"a": {"type": "string", "enum": []}}}, "no text is valid"),
        ({"properties": {"a": {"type": "string", "maxLength": -1}}}, "at least 0"),
        ({"properties": {"a": {"type": "string", "pattern": 5}}}, "pattern must be text"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "look-around"),
        ({"properties": {"a": {"type": "string", "pattern": "(" * 3000}}}, "cannot be used"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"properties": {"a": False}, "required": ["a"]}, "cannot be used"),
    ],
)
def test_a_strict_schema_that_cannot_be_expressed(nano: GuideCompiler, parameters: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        nano.tool_calls([tool("t", parameters, strict=True), tool("u", WEATHER)], required=False)
    assert message in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("tools", "name", "message"),
    [
        ([], None, "1 to 512"),
        ([tool(f"t{index}") for index in range(513)], None, "1 to 512"),
        ([5], None, "function name"),
        ([{"function": {"name": 5}}], None, "function name"),
        ([tool("a b")], None, "white space"),
        ([tool("<a>")], None, "< and >"),
        ([tool("a"), tool("a")], None, "two tools"),
        ([tool("a")], "b", "tool_choice"),
    ],
)
def test_malformed_tools(tools: list[Any], name: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        callable_tools(tools, name=name)


def test_names_are_literals_of_the_grammar(nano: GuideCompiler) -> None:
    """Quotation marks, slashes and line breaks in a client's names and patterns stay inside their literals."""
    key = 'k"/\\\u00e9\U0001f600'
    hostile = tool(
        'n"|start:/',
        {"properties": {key: {"type": "string", "pattern": 'x/ | "y"\n\\/'}}, "required": [key]},
        strict=True,
    )
    guide = nano.tool_calls([hostile], required=True).guide(nano.vocabulary.tokenizer.stop_ids)
    text = f'<tool_call>n"|start:/<arg_key>{key}</arg_key><arg_value>x/ </arg_value></tool_call>'
    assert follows(nano, guide, text)
    table = callable_tools([hostile])
    assert json.dumps(table[0].name) in tool_call_grammar(table, exact=set(), required=True)
