"""JSON schemas, regular expressions, grammars and tool calls to what `Guide` needs, on top of llguidance.

Compiling is CPU work for a worker thread (llguidance releases the GIL). It is bounded by the sizes below and by
llguidance's own limits on states, items and fuel. Every failure is a RequestError.

JSON schemas: draft 2020-12 but uniqueItems, contains, propertyNames, dependentRequired, dependentSchemas, not,
if/then/else, unevaluated*, remote $ref, oneOf of overlapping schemas, patterns with look-around or back-references, and
unknown formats; these are refused, never ignored. Properties come in the order of the schema. Between the values of a
document at most 64 characters of white space may stand. llguidance's own key "x-guidance" is refused too.
"""

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from indexshare.chat.tokenizer import Tokenizer
from indexshare.chat.tool_grammar import WHITESPACE, CallableTool, callable_tools, tool_call_grammar
from indexshare.engine.guide import Guide, Vocabulary, matcher_error
from indexshare.errors import RequestError

MAX_SCHEMA_BYTES = 256 * 1024
MAX_PATTERN_BYTES = 16 * 1024
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 60  # of nested JSON values; llguidance's reader stops at 128
MAX_SCHEMA_VALUES = 20_000
MAX_PROPERTIES = 1_000  # of one object
MAX_ENUM = 10_000  # values
# llguidance builds a table of this length for multipleOf; without a limit it takes all memory there is.
MAX_MULTIPLE = 100_000
_MAX_TOOLS_GRAMMAR_BYTES = 2 * 1024 * 1024
_MAX_CACHED = 8
# Fuel for the first lexer also bounds the expressions made while masking: a hostile step takes 60 ms, not 800.
_LIMITS = LLParserLimits(
    max_items_in_row=10_000, initial_lexer_fuel=200_000, max_lexer_states=50_000, verbose_errors=False
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledGuide:
    """Rules ready for use; `guide` makes the state of one request and is cheap. May be shared between requests."""

    vocabulary: Vocabulary
    matcher: LLMatcher | None = None
    may_call: bool = True

    def guide(self, stop_ids: Sequence[int], *, thinking: bool = False, thinking_budget: int | None = None) -> Guide:
        """A fresh guide; arguments and errors as for `Guide`."""
        return Guide(
            self.vocabulary,
            None if self.matcher is None else self.matcher.deep_copy(),
            stop_ids=stop_ids,
            thinking=thinking,
            thinking_budget=thinking_budget,
            may_call=self.may_call,
        )


class GuideCompiler:
    """Makes guides for one model; thread-safe. vocab_size: the width of the model's logits.

    The first call that needs a grammar prepares the vocabulary (1 s and a few hundred MB for 150,000 tokens).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocabulary = Vocabulary(tokenizer, vocab_size)
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, CompiledGuide] = OrderedDict()

    def free(self, *, may_call: bool = True) -> CompiledGuide:
        """No grammar: for a thinking budget alone, and with may_call=False for an answer without tool calls."""
        return CompiledGuide(vocabulary=self.vocabulary, may_call=may_call)

    def json_object(self) -> CompiledGuide:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | bool) -> CompiledGuide:
        """JSON that is valid under the schema (the module's docstring says which). RequestError: what is wrong."""
        text = _schema_text(schema)
        return self._compile("schema", LLMatcher.grammar_from_lark(f"start: %json {text}"))

    def regex(self, pattern: str) -> CompiledGuide:
        """Text that the pattern (Rust syntax: no look-around, no back-references) matches from its start to its end."""
        _check_text("the regular expression", pattern, MAX_PATTERN_BYTES)
        return self._compile("regular expression", LLMatcher.grammar_from_regex(pattern))

    def grammar(self, text: str) -> CompiledGuide:
        """Text that matches an EBNF grammar: the rule `start` in llguidance's dialect of Lark, or `root` in GBNF."""
        _check_text("the grammar", text, MAX_GRAMMAR_BYTES)
        if "::=" in text:
            try:
                text = gbnf_to_lark(text)
            except Exception as error:  # what the library raises: GbnfToLarkError, but also Exception
                raise RequestError(f"the grammar cannot be used: {error}"[:300]) from error
        for found in re.finditer("%json", text):
            try:
                schema, _ = json.JSONDecoder().raw_decode(text[found.end() :].lstrip())
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the grammar has a %json that no JSON follows: {error}"[:300]) from error
            _schema_text(schema)
        return self._compile("grammar", LLMatcher.grammar_from_lark(text))

    def tool_calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        required: bool,
        name: str | None = None,
        parallel: bool = True,
        answer: Mapping[str, Any] | bool | None = None,
    ) -> CompiledGuide:
        """GLM tool calls: `required` (or `name`, that one only) means calls and nothing else, at least one; otherwise
        free text may come first and calls may follow. Not parallel: at most one call. answer: a schema; the reply is
        then either JSON under it, or calls.

        A tool with "strict": true is called exactly as its schema says. So are all tools when calls are required,
        except those whose schema cannot be expressed: they keep a known name and well-formed tags.
        Raises RequestError for an unknown name, a malformed tool, or a strict one that cannot be expressed.
        """
        table = callable_tools(tools, name=name)
        required = required or name is not None
        enforced = [tool for tool in table if tool.strict or required]
        rules: dict[str, Any] = {"required": required, "parallel": parallel}
        if answer is not None:
            rules["answer"] = _schema_text(answer)
        try:
            return self._calls(table, enforced, **rules)
        except RequestError:
            # Some schema cannot be expressed. Do without it, unless the tool is strict: then that is the error.
            enforced = [tool for tool in enforced if tool.strict or self._is_expressible(tool)]
            return self._calls(table, enforced, **rules)

    def _calls(self, tools: Sequence[CallableTool], enforced: Sequence[CallableTool], **rules: Any) -> CompiledGuide:
        for tool in enforced:
            _schema_text(tool.parameters, f"the schema of tool {tool.name!r}")
        text = tool_call_grammar(tools, exact={tool.name for tool in enforced}, **rules)
        if len(text) > _MAX_TOOLS_GRAMMAR_BYTES:
            raise RequestError("the schemas of these tools are too large together: send fewer tools")
        return self._compile("tools", LLMatcher.grammar_from_lark(text))

    def _is_expressible(self, tool: CallableTool) -> bool:
        try:
            self._calls([tool], [tool], required=True, parallel=False)
        except RequestError:
            return False
        return True

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_TokenizerView(self.vocabulary.tokenizer)))

    def _compile(self, what: str, text: str) -> CompiledGuide:
        if not self.vocabulary.tokenizer.stop_ids:
            raise RequestError("this model's tokenizer has no stop token, without which no reply can be constrained")
        with self._lock:
            if text in self._cache:
                self._cache.move_to_end(text)
                return self._cache[text]
            tokenizer = self._tokenizer
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds grammars that cannot even begin
        if matcher.is_error():
            raise RequestError(f"the {what} cannot be used: {matcher_error(matcher)}")
        compiled = CompiledGuide(vocabulary=self.vocabulary, matcher=matcher)
        with self._lock:
            self._cache[text] = compiled
            if len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        return compiled


class _TokenizerView:
    """Our tokenizer with the attributes that llguidance reads. It asks for one end token; guides handle the others."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.stop_ids[0]
        self.bos_token_id: int | None = None
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_ids.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _check_text(what: str, text: object, max_bytes: int) -> None:
    if not isinstance(text, str) or not text:
        raise RequestError(f"{what} must be text and not empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"{what} holds a lone surrogate; it is not Unicode") from error
    if size > max_bytes:
        raise RequestError(f"{what} has {size:,} bytes; at most {max_bytes:,} are supported")


def _schema_text(schema: object, what: str = "the JSON schema") -> str:
    """The schema as JSON with our white space rule, after a check of everything that is bounded here."""
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"{what} must be an object or a boolean, not {type(schema).__name__}")
    try:
        text = json.dumps(schema, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what}: not JSON: {str(error)[:200]}") from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(f"{what}: {len(text):,} bytes; at most {MAX_SCHEMA_BYTES:,} are supported")
    if isinstance(schema, bool):
        return text
    if "x-guidance" in schema:
        raise RequestError(f"{what}: the key 'x-guidance' is not supported; leave it out")
    multiples: list[Decimal] = []
    _check_values(schema, multiples, what)
    num_places = max((-int(multiple.as_tuple().exponent) for multiple in multiples), default=0)
    common = 1
    for multiple in multiples:
        common = math.lcm(common, int(multiple.scaleb(max(num_places, 0))))
        if common > MAX_MULTIPLE:
            raise RequestError(
                f"{what}: the values of multipleOf may have a least common multiple of at most {MAX_MULTIPLE:,} "
                "units of their last decimal place"
            )
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def _check_values(schema: Mapping[str, Any], multiples: list[Decimal], what: str) -> None:
    """Bound the schema's values; collect those of multipleOf."""
    num_values = 0
    pending: list[tuple[object, int]] = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        num_values += 1
        if depth > MAX_SCHEMA_DEPTH or num_values > MAX_SCHEMA_VALUES:
            raise RequestError(
                f"{what} is too complex: at most {MAX_SCHEMA_DEPTH} levels and {MAX_SCHEMA_VALUES:,} values"
            )
        if isinstance(value, Mapping):
            _check_object(value, multiples, what)
            pending += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list | tuple):
            pending += [(item, depth + 1) for item in value]


def _check_object(schema: Mapping[str, Any], multiples: list[Decimal], what: str) -> None:
    if isinstance(names := schema.get("properties"), Mapping) and len(names) > MAX_PROPERTIES:
        raise RequestError(f"{what} has an object of {len(names):,} properties; at most {MAX_PROPERTIES:,}")
    if isinstance(values := schema.get("enum"), list) and len(values) > MAX_ENUM:
        raise RequestError(f"{what} has an enum of {len(values):,} values; at most {MAX_ENUM:,}")
    if isinstance(pattern := schema.get("pattern"), str) and len(pattern) > MAX_PATTERN_BYTES:
        raise RequestError(f"{what} has a pattern longer than {MAX_PATTERN_BYTES:,} characters")
    multiple = schema.get("multipleOf")
    if isinstance(multiple, int | float) and not isinstance(multiple, bool):
        if multiple <= 0:
            raise RequestError(f"{what} has a multipleOf that is not above 0")
        multiples.append(Decimal(str(multiple)).normalize())
