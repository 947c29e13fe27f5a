"""Guides and the grammars behind them: sound masks, exact rollback, bounded work."""

import json
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import indexshare
from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine import grammar as grammar_module
from indexshare.engine.grammar import CompiledGuide, GuideCompiler
from indexshare.engine.guide import Allowed, Guide, constrain
from indexshare.errors import RequestError

NANO = Tokenizer.from_directory(Path(indexshare.__file__).parent / "models" / "nano")
EXTRA = 24  # logits are wider than the vocabulary, as in GLM-5.2
COMPILER = GuideCompiler(NANO, NANO.vocab_size + EXTRA)
STOPS = NANO.stop_ids
CONTROL = frozenset(NANO.control_ids.values())
THINK_END = NANO.control_id("</think>")
CALL = NANO.control_id("<tool_call>")

NAME = {"type": "string", "pattern": "^[A-Z][a-z]+$"}
TREE = {"$ref": "#/$defs/node", "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3}}}
# Each schema with instances that are valid under it, their keys in the schema's order.
SCHEMAS: list[tuple[Any, list[Any]]] = [
    (True, [None, 1.5, "x", [1, "two"], {"a": {"b": []}}]),
    ({}, [{}, [], -3]),
    ({"type": "object"}, [{}, {"a": 1}, {"é": "\U0001f600"}]),
    ({"type": "string"}, ["", 'quote " and \\ and \n', "\u0000\t", "ключ </think>"]),
    ({"type": "integer"}, [0, -7, 10**20]),
    ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, [-3, 0, 11]),
    ({"type": "number", "minimum": 0.5, "maximum": 2}, [0.5, 1.25, 2]),
    ({"type": "integer", "multipleOf": 7}, [0, 7, 49, 7000]),
    ({"type": ["boolean", "null"]}, [True, False, None]),
    ({"enum": ["a", 'b"c', 3, None, [1], {"k": "v"}]}, ["a", 'b"c', 3, None, [1], {"k": "v"}]),
    ({"const": {"x": [1, 2, "é"]}}, [{"x": [1, 2, "é"]}]),
    (NAME, ["Ada", "Grace"]),
    ({"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "ab\\c", 'é"x', "\U0001f600\U0001f600"]),
    ({"type": "string", "format": "date"}, ["2026-01-31"]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}, [[1], [1, -2, 3]]),
    ({"type": "array", "prefixItems": [{"type": "boolean"}, NAME], "items": False}, [[True, "Ada"], [False]]),
    (TREE, [[], [[], [[]]], [[[[]]]]]),
    ({"anyOf": [{"type": "integer"}, NAME, {"type": "null"}]}, [5, "Ada", None]),
    ({"oneOf": [{"const": 1}, {"const": "one"}]}, [1, "one"]),
    ({"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 9}]}, [5, 9]),
    (
        {
            "type": "object",
            "properties": {"name": NAME, "age": {"type": "integer", "minimum": 0}, "tags": {"type": "array"}},
            "required": ["name"],
            "additionalProperties": False,
        },
        [{"name": "Ada"}, {"name": "Ada", "age": 36}, {"name": "Ada", "tags": ["x", {"y": 1}]}],
    ),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "required": ["b"]}, [{"b": 1}, {"b": 1, "z": 2}]),
    ({"type": "object", "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False}, [{"xa": None}]),
]
PATTERNS = [
    "[0-9]{3}-[0-9]{4}",
    "(yes|no)!?",
    "^[a-z]+@[a-z]+[.]com$",
    "(a|b)*abb",
    'é"+/[^/]{2,5}',
    "x{0,3}\n?",
    "(?i)ok",
]


def ids_of(allowed: Allowed | None) -> list[int]:
    assert allowed is not None
    return [allowed] if isinstance(allowed, int) else allowed.nonzero()[:, 0].tolist()


def permits(guide: Guide, token_id: int) -> bool:
    allowed = guide.allowed()
    return allowed is None or (token_id == allowed if isinstance(allowed, int) else bool(allowed[token_id]))


def feed(guide: Guide, text: str, *, allow_control: bool = True) -> None:
    for token_id in NANO.encode(text, allow_control=allow_control):
        assert permits(guide, token_id), (text, NANO.token_bytes(token_id))
        guide.accept(token_id)


def walk(guide: Guide, seed: int, *, eager: int = 30) -> str:
    """The text of one random reply; after `eager` tokens it closes strings and brackets where it can."""
    chance = random.Random(seed)
    closers = [NANO.encode(mark)[0] for mark in ('"', "]", "}", "@", ".")]
    tokens: list[int] = []
    while len(tokens) < 3000:
        ids = ids_of(guide.allowed())
        assert ids and max(ids) < NANO.vocab_size
        plain = [token_id for token_id in ids if token_id not in CONTROL]
        assert CONTROL.intersection(ids) in (set(), set(STOPS))
        hurry = len(tokens) >= eager
        if len(plain) < len(ids) and (hurry or not plain or chance.random() < 0.3):
            return NANO.decode(tokens)
        closing = [token_id for token_id in closers if token_id in plain]
        token_id = chance.choice(closing if closing and (hurry or chance.random() < 0.3) else plain)
        guide.accept(token_id)
        tokens.append(token_id)
    raise AssertionError(f"no end in sight: {NANO.decode(tokens)[-200:]!r}")


@pytest.mark.parametrize(("schema", "instances"), SCHEMAS, ids=lambda value: json.dumps(value)[:40])
def test_json_schemas(schema: Any, instances: list[Any]) -> None:
    compiled = COMPILER.json_schema(schema)
    for instance in instances:
        jsonschema.validate(instance, schema)
        for separators in ((",", ":"), (", ", ": ")):
            guide = compiled.guide(STOPS)
            feed(guide, json.dumps(instance, ensure_ascii=False, separators=separators), allow_control=False)
            assert set(STOPS) <= set(ids_of(guide.allowed()))
    for seed in range(6):
        jsonschema.validate(json.loads(walk(compiled.guide(STOPS), seed)), schema)


INSTANCE = st.fixed_dictionaries(
    {"name": st.from_regex("[A-Z][a-z]{1,8}", fullmatch=True)},
    optional={"age": st.integers(0, 10**6), "tags": st.lists(st.text(st.characters(exclude_categories=["C"])))},
)


@given(INSTANCE)
@settings(max_examples=30)
def test_random_instances_are_accepted(instance: dict[str, Any]) -> None:
    ordered = {key: instance[key] for key in ("name", "age", "tags") if key in instance}
    text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))
    feed(COMPILER.json_schema(SCHEMAS[-3][0]).guide(STOPS), text, allow_control=False)


def test_invalid_json_is_refused() -> None:
    for schema, text in (
        (SCHEMAS[-3][0], '{"name":"ada'),
        (SCHEMAS[-3][0], '{"age":1'),
        (SCHEMAS[-3][0], '{"name":"Ada","age":-'),
        ({"type": "object"}, "["),
        ({"type": "object"}, " {"),
        ({"type": "array"}, "[" + "\n" * 65),
    ):
        with pytest.raises(AssertionError):
            feed(COMPILER.json_schema(schema).guide(STOPS), text)
    feed(COMPILER.json_object().guide(STOPS), '{\n    "a": [\n        1\n    ]\n}')


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regular_expressions(pattern: str) -> None:
    compiled = COMPILER.regex(pattern)
    for seed in range(10):
        text = walk(compiled.guide(STOPS), seed)
        assert re.fullmatch(pattern, text), text


def test_grammars() -> None:
    text = 'start: item ("," item)*\nitem: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,4}/'
    guide = COMPILER.grammar(text).guide(STOPS)
    feed(guide, "1,(22,(3))")
    assert set(STOPS) <= set(ids_of(guide.allowed()))
    feed(COMPILER.grammar('start: "x" %json {"type": "integer"} "y"').guide(STOPS), "x12y")


def test_a_grammar_may_be_gbnf() -> None:
    guide = COMPILER.grammar('root ::= "yes" | "no" num\nnum ::= [0-9]+ ("," [0-9]+)*').guide(STOPS)
    feed(guide, "no12,7")
    assert set(STOPS) <= set(ids_of(guide.allowed()))
    for broken in ('root ::= ("a', "::=", "root ::= " + "(" * 60_000, 'other ::= "a"'):
        with pytest.raises(RequestError):
            COMPILER.grammar(broken)


def test_the_grammar_ends_with_the_requests_stop_tokens_only() -> None:
    for stop_ids in (STOPS[:1], STOPS[1:], (*STOPS, NANO.control_id("<|assistant|>"))):
        guide = COMPILER.regex("[0-9]{2}").guide(stop_ids)
        for _ in range(2):
            assert not CONTROL.intersection(ids_of(guide.allowed()))
            guide.accept(NANO.encode("7")[0])
        assert ids_of(guide.allowed()) == sorted(stop_ids)
        guide.accept(stop_ids[-1])
        assert ids_of(guide.allowed()) == sorted(stop_ids)  # a draft may run past the end


def test_a_clients_grammar_cannot_open_a_role() -> None:
    guide = COMPILER.grammar('start: "a" <|user|> "b"').guide(STOPS[:1])
    feed(guide, "a")
    with pytest.raises(RequestError, match="allows no token here"):
        guide.allowed()
    guide = COMPILER.grammar("start: <[*]>+").guide(STOPS[:1])
    ids = set(ids_of(guide.allowed()))
    assert not ids & (NANO.hidden_ids | set(STOPS)) and NANO.encode("a")[0] in ids


def test_thinking_comes_first() -> None:
    compiled = COMPILER.json_object()
    guide = compiled.guide(STOPS, thinking=True)
    feed(guide, "Let me [think]: {")
    ids = set(ids_of(guide.allowed()))
    assert not ids & {*STOPS, CALL, *NANO.hidden_ids} and len(ids) > NANO.vocab_size - 30 and max(ids) < NANO.vocab_size
    feed(guide, "</think>")
    assert not permits(guide, NANO.encode("Let")[0])
    feed(guide, '{"a": 1}')
    assert ids_of(guide.allowed()) == sorted(STOPS)
    # Thinking is off: the prompt ended with <think></think>.
    feed(compiled.guide(STOPS), '{"a": 1}')


@pytest.mark.parametrize("compiled", [COMPILER.json_object(), COMPILER.free(), COMPILER.free(may_call=False)])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_closes_the_reasoning(compiled: CompiledGuide, budget: int) -> None:
    guide = compiled.guide(STOPS, thinking=True, thinking_budget=budget)
    for _ in range(budget):
        assert not isinstance(guide.allowed(), int)
        guide.accept(NANO.encode("a")[0])
    assert guide.allowed() == THINK_END
    guide.accept(THINK_END)
    if compiled.matcher is None:
        feed(guide, "any answer <|user|>")
    else:
        feed(guide, "{}<|user|>")


def test_a_reasoning_that_ends_early_and_no_thinking_have_no_budget() -> None:
    guide = COMPILER.free().guide(STOPS, thinking=True, thinking_budget=9)
    feed(guide, "so</think>" + "an answer of many tokens " * 9)
    assert guide.allowed() is None
    assert COMPILER.free().guide(STOPS, thinking=False, thinking_budget=0).allowed() is None
    free = COMPILER.free().guide(STOPS, thinking=True, thinking_budget=9)
    assert permits(free, STOPS[0])  # no answer is owed


def test_no_tool_calls() -> None:
    for thinking in (False, True):
        guide = COMPILER.free(may_call=False).guide(STOPS, thinking=thinking)
        assert ids_of(guide.allowed()) == [i for i in range(NANO.vocab_size) if i != CALL]
        feed(guide, "as in <tool_call")
        assert not permits(guide, NANO.encode(">")[0]) and permits(guide, NANO.encode("x")[0])


def test_the_end_of_reasoning_is_a_token_and_not_its_name() -> None:
    """The parser reads text: a name spelled in plain tokens would end the reasoning for it, and not for the guide."""
    for compiled in (COMPILER.json_object(), COMPILER.free()):
        guide = compiled.guide(STOPS, thinking=True, thinking_budget=100)
        feed(guide, "the tag </think")
        assert not permits(guide, NANO.encode(">")[0])
        guide.accept(NANO.encode("x")[0])
        assert permits(guide, NANO.encode(">")[0])
        feed(guide, "</think>")


@given(st.data())
@settings(max_examples=60)
def test_rollback_is_replay(data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(COMPILED) - 1))
    thinking, budget = data.draw(st.booleans()), data.draw(st.sampled_from([None, 0, 2]))

    def fresh() -> Guide:
        return COMPILED[index].guide(STOPS, thinking=thinking, thinking_budget=budget)

    guide, accepted = fresh(), []
    for _ in range(data.draw(st.integers(1, 8))):
        for _ in range(data.draw(st.integers(0, 6))):
            allowed = guide.allowed()
            ids = list(range(NANO.vocab_size)) if allowed is None else ids_of(allowed)
            favoured = [i for i in ids if i in CONTROL or len(NANO.token_bytes(i)) == 1]
            token_id = data.draw(st.sampled_from(favoured or ids))
            guide.accept(token_id)
            accepted.append(token_id)
        num_back = data.draw(st.integers(0, len(accepted)))
        guide.rollback(num_back)
        del accepted[len(accepted) - num_back :]
        replayed = fresh()
        for token_id in accepted:
            replayed.accept(token_id)
        ours, theirs = guide.allowed(), replayed.allowed()
        assert (ours is None and theirs is None) or ids_of(ours) == ids_of(theirs)


COMPILED = [
    COMPILER.json_schema(SCHEMAS[-3][0]),
    COMPILER.json_object(),
    COMPILER.regex("(a|b)*abb"),
    COMPILER.free(may_call=False),
    COMPILER.free(),
    COMPILER.tool_calls([{"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}], required=True),
]


def test_guides_of_one_grammar_do_not_disturb_each_other() -> None:
    compiled = COMPILER.regex("[0-9]{3}")
    first, second = compiled.guide(STOPS), compiled.guide(STOPS)
    feed(first, "123")
    assert permits(second, NANO.encode("7")[0]) and ids_of(first.allowed()) == sorted(STOPS)
    assert COMPILER.regex("[0-9]{3}") is compiled


def test_constrain() -> None:
    logits = torch.randn(COMPILER.vocabulary.size)
    before = logits.clone()
    assert constrain(logits, None) is logits
    forced = constrain(logits, 5)
    assert forced[5] == logits[5] and int(forced.isfinite().sum()) == 1
    mask = COMPILER.json_object().guide(STOPS).allowed()
    assert isinstance(mask, torch.Tensor) and mask.shape == logits.shape
    masked = constrain(logits, mask)
    assert torch.equal(masked.isfinite(), mask) and torch.equal(masked[mask], logits[mask])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    [
        ("json_schema", [], "object or a boolean"),
        ("json_schema", False, "Unsatisfiable"),
        ("json_schema", {"type": "invalid"}, "Invalid type"),
        ("json_schema", {"pattern": "("}, "unclosed group"),
        ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look"),
        ("json_schema", {"not": {}}, "not"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"type": "string", "format": "nope"}, "nope"),
        ("json_schema", {"enum": []}, "(?i)unsatisfiable"),
        ("json_schema", {"$ref": "http://example.com/x.json"}, "retriev"),
        ("json_schema", {"$ref": "#"}, "cannot be used"),
        ("json_schema", {"minimum": float("nan")}, "not JSON"),
        ("json_schema", {"const": "\ud800"}, "cannot be used"),
        ("json_schema", {"x-guidance": {"lenient": True}}, "x-guidance"),
        ("json_schema", {"description": "x" * 300_000}, "bytes"),
        ("json_schema", {"enum": [f"value {index}" for index in range(10_001)]}, "enum of 10,001"),
        ("json_schema", {"properties": {f"p{index}": {} for index in range(1001)}}, "1,001 properties"),
        ("json_schema", {"enum": [[1, 2]] * 9_999}, "too complex"),
        ("json_schema", {"allOf": [{"multipleOf": prime} for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23)]}, "multipleOf"),
        ("json_schema", {"allOf": [{"multipleOf": 0.001}, {"multipleOf": 1009}]}, "multipleOf"),
        ("json_schema", {"multipleOf": 10**300}, "multipleOf"),
        ("json_schema", {"anyOf": [{"multipleOf": -444_441}]}, "multipleOf"),
        ("json_schema", {"multipleOf": 0}, "multipleOf"),
        ("regex", "", "not empty"),
        ("regex", 5, "must be text"),
        ("regex", "(?:", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "\ud800", "surrogate"),
        ("regex", "a" * 16_385, "16,385 bytes"),
        ("regex", "(" * 8000 + ")" * 8000, "cannot be used"),
        ("grammar", "garbage", "cannot be used"),
        ("grammar", 'foo: "a"', "start"),
        ("grammar", "start: " + "(" * 20_000, "nested"),
        ("grammar", "start: @other", "other"),
        ("grammar", '%import "/etc/passwd"', "cannot be used"),
        ("grammar", 'start: %json {"multipleOf": 1000003}', "multipleOf"),
        ("grammar", "start: %json [", "no JSON follows"),
        ("grammar", "# " * 40_000, "80,000 bytes"),
        ("grammar", "start: a\na: a", "cannot be used"),
    ],
)
def test_what_cannot_be_used(method: str, argument: Any, message: str) -> None:
    started = time.thread_time()
    with pytest.raises(RequestError, match=message) as caught:
        getattr(COMPILER, method)(argument)
    assert len(str(caught.value)) < 400 and "<state>" not in str(caught.value)
    assert time.thread_time() - started < 2


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("regex", "(([a-z]{1,99}){1,99}){1,99}"),
        ("regex", "(.*a){20}.{20}"),
        ("regex", "(x+x+)+y"),
        ("regex", "[^a]{1,99}" * 1600),
        ("grammar", "start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1} |" for n in range(60)) + '\na60: "x"'),
        ("grammar", "start: A0\n" + "\n".join(f"A{n}: A{n + 1}{{1000}}" for n in range(4)) + '\nA4: "x"'),
        ("grammar", "start: A\nA: ~/.*a.{12}/ & ~/.*b.{12}/ & ~/.*c.{12}/"),
        ("json_schema", {"type": "string", "minLength": 10**9}),
        ("json_schema", {"type": "array", "items": {"type": "string"}, "minItems": 10**6}),
        ("json_schema", {"properties": {f"property {index}": {"type": "string"} for index in range(1000)}}),
        ("json_schema", {"enum": [f"value {index}" for index in range(10_000)]}),
        ("json_schema", {"anyOf": [{"anyOf": [{"items": {"minimum": a * b}} for a in range(30)]} for b in range(30)]}),
        ("json_schema", {"type": "integer", "multipleOf": 99_991}),
        ("json_schema", nested(2000)),
        ("json_schema", nested(29)),
    ],
)
def test_hostile_input_is_refused_or_costs_little(method: str, argument: Any) -> None:
    """It may compile, it may fail at once or on the way; only ever with RequestError, and soon."""
    chance, slowest = random.Random(0), 0.0
    try:
        started = time.thread_time()
        guide = getattr(COMPILER, method)(argument).guide(STOPS)
        slowest = time.thread_time() - started
        for _ in range(20):
            started = time.thread_time()
            plain = [token_id for token_id in ids_of(guide.allowed()) if token_id not in CONTROL]
            if plain:
                guide.accept(chance.choice(plain))
            slowest = max(slowest, time.thread_time() - started)
    except RequestError:
        pass
    assert slowest < 2
    feed(COMPILER.regex("still [a-z]+").guide(STOPS), "still alive")


def test_a_matcher_that_runs_out_reports_it() -> None:
    guide = COMPILER.regex("(([a-z]{1,99}){1,99}){1,99}").guide(STOPS)

    def generate() -> None:
        for letter in "abcdefghijklmnop" * 20:
            guide.allowed()
            guide.accept(NANO.encode(letter)[0])

    with pytest.raises(RequestError, match=r"the grammar (is too complex|cannot go on)"):
        generate()


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    guide = COMPILER.regex("[0-9]+").guide(STOPS)
    with pytest.raises(RequestError, match="cannot go on"):
        guide.accept(NANO.encode("x")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop_ids": ()}, "at least one stop token"),
        ({"stop_ids": (-1,)}, "stop token ids"),
        ({"stop_ids": (10**6,)}, "stop token ids"),
        ({"stop_ids": STOPS, "thinking_budget": -1}, "thinking_budget"),
        ({"stop_ids": STOPS, "thinking_budget": True}, "thinking_budget"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        COMPILER.json_object().guide(**arguments)


def test_a_tokenizer_without_the_tokens_that_are_needed() -> None:
    spec = json.loads((Path(indexshare.__file__).parent / "models" / "nano" / "tokenizer.json").read_text())
    spec["added_tokens"] = []
    bare = GuideCompiler(Tokenizer(spec), 4096)
    with pytest.raises(RequestError, match="stop token"):
        bare.json_object()
    bare.free().guide(())
    stop = {"id": 4095, "content": "<|endoftext|>"}
    plain = GuideCompiler(Tokenizer({**spec, "added_tokens": [stop]}), 4096)
    with pytest.raises(RequestError, match="</think>"):
        plain.json_object().guide((4095,), thinking=True)
    assert plain.json_object().guide((4095,)).allowed() is not None


def test_threads_share_one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    view = grammar_module._TokenizerView
    monkeypatch.setattr(grammar_module, "_TokenizerView", lambda tokenizer: made.append(1) or view(tokenizer))
    compiler = GuideCompiler(NANO, NANO.vocab_size)
    start = threading.Barrier(4)

    def compile_one(digit: int) -> None:
        start.wait()
        results.append(compiler.regex(f"{digit}[0-9]+").guide(STOPS))

    results: list[Guide] = []
    threads = [threading.Thread(target=compile_one, args=(digit,)) for digit in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and len(results) == 4
