"""The GLM-5.2 format, row by row (facts 4.6), and against transformers' rendering of the same template."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from indexshare.chat.template import ChatTemplate, encode_chat, resolve_effort
from indexshare.chat.tokenizer import Tokenizer
from indexshare.chat.types import Message, ToolCall
from indexshare.errors import RequestError, TemplateError

TEMPLATE = ChatTemplate()
MAX = "[gMASK]<sop><|system|>Reasoning Effort: Max"
REMINDER = (
    "<reminder>You are unable to process this {} because you don't have multi-modal input ability. "
    "Try different methods.</reminder>"
)
TOOLS_TEXT = """<|system|>
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{{function-name}}<arg_key>{{arg-key-1}}</arg_key><arg_value>{{arg-value-1}}</arg_value>\
<arg_key>{{arg-key-2}}</arg_key><arg_value>{{arg-value-2}}</arg_value>...</tool_call>"""


def user(text: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": text}


def function(name: str, **extra: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Zürich <b>", **extra}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


TURNS = [
    user("one"),
    {"role": "assistant", "content": " A ", "reasoning_content": "old"},
    user("two"),
    {"role": "assistant", "content": None, "reasoning_content": "new", "tool_calls": [call("f", a="x", b=[1, 2])]},
    {"role": "tool", "content": "r1", "tool_call_id": "c1"},
    {"role": "tool", "content": "r2"},
]
CALLS = (
    "<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value>"
    "<arg_key>b</arg_key><arg_value>[1, 2]</arg_value></tool_call>"
)
RESULTS = "<|observation|><tool_response>r1</tool_response><tool_response>r2</tool_response>"
OPEN = "<|assistant|><think>"
CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("nothing asked for", [user()], {}, f"{MAX}<|user|>hi{OPEN}"),
    ("effort high", [user()], {"reasoning_effort": "high"}, f"{MAX[:-3]}High<|user|>hi{OPEN}"),
    ("effort low is high", [user()], {"reasoning_effort": "low"}, f"{MAX[:-3]}High<|user|>hi{OPEN}"),
    ("effort max", [user()], {"reasoning_effort": "xhigh"}, f"{MAX}<|user|>hi{OPEN}"),
    ("effort none", [user()], {"reasoning_effort": "none"}, f"[gMASK]<sop><|user|>hi{OPEN}</think>"),
    ("thinking off", [user()], {"enable_thinking": False}, f"[gMASK]<sop><|user|>hi{OPEN}</think>"),
    ("no generation prompt", [user()], {"add_generation_prompt": False}, f"{MAX}<|user|>hi"),
    ("system", [{"role": "system", "content": "Be.\n"}, user()], {}, f"{MAX}<|system|>Be.\n<|user|>hi{OPEN}"),
    ("developer", [{"role": "developer", "content": "Be."}, user()], {}, f"{MAX}<|system|>Be.<|user|>hi{OPEN}"),
    (
        "reasoning cleared before the last user message, calls and results",
        TURNS,
        {},
        f"{MAX}<|user|>one{OPEN}</think>A<|user|>two{OPEN}new</think>{CALLS}{RESULTS}{OPEN}",
    ),
    (
        "reasoning kept",
        TURNS,
        {"clear_thinking": False},
        f"{MAX}<|user|>one{OPEN}old</think>A<|user|>two{OPEN}new</think>{CALLS}{RESULTS}{OPEN}",
    ),
    (
        "reasoning split from content",
        [user(), {"role": "assistant", "content": "x<think>why</think>\n\nbecause\n"}],
        {"add_generation_prompt": False},
        f"{MAX}<|user|>hi{OPEN}why</think>because",
    ),
    (
        "assistant without reasoning; two calls, one without arguments",
        [user(), {"role": "assistant", "content": "x", "tool_calls": [call("f"), call("g", k=None, z="é\n", t=True)]}],
        {"add_generation_prompt": False},
        f"{MAX}<|user|>hi{OPEN}</think>x<tool_call>f</tool_call><tool_call>g<arg_key>k</arg_key><arg_value>null"
        "</arg_value><arg_key>z</arg_key><arg_value>é\n</arg_value><arg_key>t</arg_key><arg_value>true</arg_value>"
        "</tool_call>",
    ),
    (
        "two separate runs of results",
        [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "m"}, {"role": "tool", "content": "b"}],
        {"add_generation_prompt": False},
        f"{MAX}<|observation|><tool_response>a</tool_response>{OPEN}</think>m<|observation|>"
        "<tool_response>b</tool_response>",
    ),
    (
        "text parts are joined",
        [user([{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}])],
        {},
        f"{MAX}<|user|>abc{OPEN}",
    ),
    (
        "media",
        [user(["see ", {"type": "image_url", "image_url": {"url": "x"}}, {"type": "video"}, {"type": "input_audio"}])],
        {},
        f"{MAX}<|user|>see {REMINDER.format('image')}{REMINDER.format('video')}{REMINDER.format('audio')}{OPEN}",
    ),
    (
        "tools: order, separators, no escaping, strict dropped, deferred left out",
        [user()],
        {
            "tools": [
                function("f", parameters={"type": "object", "properties": {"a": {"type": "number"}}}, strict=True),
                function("later", defer_loading=True),
                {"type": "function", "function": {"name": "later too"}, "defer_loading": True},
                {"name": "bare", "description": ""},
            ]
        },
        MAX
        + TOOLS_TEXT.format(
            '{"name": "f", "description": "Zürich <b>", "parameters": {"type": "object", "properties": {"a": '
            '{"type": "number"}}}}\n{"name": "bare", "description": ""}\n'
        )
        + f"<|user|>hi{OPEN}",
    ),
    (
        "deferred tools loaded by a result",
        [
            user(),
            {"role": "tool", "content": [{"type": "tool_reference", "name": name} for name in ("g", "nobody", "f")]},
        ],
        {"tools": [function("f", defer_loading=True), function("g", strict=False)]},
        MAX
        + TOOLS_TEXT.format('{"name": "g", "description": "Zürich <b>"}\n')
        + '<|user|>hi<|observation|><tool_response><tools>\n{"name": "g", "description": "Zürich <b>"}\n'
        + f'{{"name": "f", "description": "Zürich <b>"}}\n</tools></tool_response>{OPEN}',
    ),
    (
        "output lists",
        [user(), {"role": "tool", "content": [{"output": "1"}, {"output": "2"}]}],
        {},
        f"{MAX}<|user|>hi<|observation|><tool_response>1</tool_response><tool_response>2</tool_response>{OPEN}",
    ),
    (
        "a result of parts",
        [user(), {"role": "tool", "content": ["t", {"type": "image"}]}],
        {},
        f"{MAX}<|user|>hi<|observation|><tool_response>t{REMINDER.format('image')}</tool_response>{OPEN}",
    ),
]
IDS = [case[0] for case in CASES]


@pytest.mark.parametrize(("_", "messages", "options", "expected"), CASES, ids=IDS)
def test_format(_: str, messages: list[dict[str, Any]], options: dict[str, Any], expected: str) -> None:
    assert TEMPLATE.render(messages, **options) == expected


@pytest.mark.parametrize(("_", "messages", "options", "expected"), CASES, ids=IDS)
def test_transformers_renders_and_encodes_the_same(
    _: str,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    expected: str,
    backend: tokenizers.Tokenizer,
    tokenizer: Tokenizer,
) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE.source)
    conversation = [Message.from_dict(message).to_dict() for message in messages]
    variables = {"add_generation_prompt": True, **options}
    effort = variables.pop("reasoning_effort", None)
    if effort in ("low", "high"):
        variables["reasoning_effort"] = "high"
    elif effort == "none":
        variables["enable_thinking"] = False
    tools = variables.pop("tools", None)
    if tools:  # transformers passes tools on as they are; moving outer flags inward is ours
        tools = [
            {**tool, "function": {**tool["function"], **{key: tool[key] for key in ("defer_loading",) if key in tool}}}
            if "function" in tool
            else tool
            for tool in tools
        ]
    text = reference.apply_chat_template(conversation, tools=tools, tokenize=False, **variables)
    assert text == expected
    ids = reference.apply_chat_template(conversation, tools=tools, tokenize=True, return_dict=False, **variables)
    assert encode_chat(tokenizer, TEMPLATE, messages, **options) == ids


def test_message_objects_render_like_dictionaries() -> None:
    messages = [
        Message(role="user", content="q"),
        Message(role="assistant", tool_calls=(ToolCall(id="1", name="f", arguments={"a": 1}),)),
    ]
    assert TEMPLATE.render(messages) == TEMPLATE.render([message.to_dict() for message in messages])


@pytest.mark.parametrize(
    "options",
    [
        {"reasoning_effort": "ultra"},
        {"tools": [{"type": "function"}]},
        {"tools": ["f"]},
        {"tools": [{"type": "function", "function": {"name": "f"}, "x": 1}]},
        {"tools": [function("f", parameters={"a": float("nan")})]},
        {"tools": [function("f", parameters={"a": object()})]},
        {"tools": [function("f", parameters={1: 2})]},
    ],
)
def test_bad_options_are_request_errors(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        TEMPLATE.render([user()], **options)


@pytest.mark.parametrize(
    ("source", "given", "passed"),
    [
        ("GLM-5.2", "minimal", "high"),
        ("GLM-5.2", "low", "high"),  # the word stands in "following", unquoted
        ("GLM-5.2", "medium", "high"),
        ("GLM-5.2", "xhigh", "max"),
        ("{% if reasoning_effort in ['low', 'high'] %}", "low", "low"),
        ("{% if reasoning_effort in ['low', 'high'] %}", "minimal", "low"),
        ("{% if reasoning_effort in ['low', 'high'] %}", "medium", "high"),
        ("{% if reasoning_effort in ['low', 'high'] %}", "max", "max"),
        ('{% if reasoning_effort == "medium" %}', "medium", "medium"),
        ("{{ reasoning_effort }}", "low", "high"),
    ],
)
def test_an_effort_is_passed_on_where_the_template_knows_the_word(source: str, given: str, passed: str) -> None:
    template = TEMPLATE.source if source == "GLM-5.2" else source
    assert resolve_effort(given, True, template) == (passed, True)
    assert resolve_effort("none", True, template) == resolve_effort(None, False, template) == (None, False)


def test_the_effort_follows_the_template_of_the_checkpoint() -> None:
    known = ChatTemplate("{% if reasoning_effort in ['low', 'high'] %}{{ reasoning_effort }}{% endif %}")
    assert known.render([user()], reasoning_effort="low") == "low"


def test_deep_and_cyclic_input_is_a_request_error() -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    with pytest.raises(RequestError, match="deep"):
        TEMPLATE.render([user()], tools=[function("f", parameters={"a": cyclic})])


def test_long_conversations_stay_within_the_limits() -> None:
    turns = [user("q" * 2000), {"role": "assistant", "content": "a" * 2000, "reasoning_content": "r"}] * 400
    assert TEMPLATE.render(turns).count("<|user|>") == 400


def test_template_of_a_directory(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path).source == TEMPLATE.source
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "config"}))
    assert ChatTemplate.from_directory(tmp_path).source == "config"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "named"}]}))
    assert ChatTemplate.from_directory(tmp_path).source == "named"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert ChatTemplate.from_directory(tmp_path).source == "own file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="cannot read"):
        ChatTemplate.from_directory(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text("[" * 100_000)
    with pytest.raises(TemplateError, match="cannot read the chat template"):
        ChatTemplate.from_directory(tmp_path)
