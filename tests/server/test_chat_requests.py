"""What /v1/chat/completions makes of a request, and what it refuses."""

import asyncio
import json
from typing import Any

import pytest
from server.dialects import post as post_as
from server.openai_client import CHAT, HELLO, USER, WEATHER, played, post, routes

from indexshare.engine.sampler import SamplingParams
from indexshare.server.types import ChatRequest, OutputFormat, ToolChoice


def refused(**fields: Any) -> dict[str, Any]:
    service = played(*HELLO)
    response = post(service, CHAT, {"model": "scripted", "messages": USER} | fields)
    assert response.status_code == 400 and not service.seen
    return response.json()["error"]


def asked(**fields: Any) -> ChatRequest:
    """The neutral request that the service sees."""
    service = played(*HELLO)
    assert post(service, CHAT, {"model": "scripted", "messages": USER} | fields).status_code == 200
    (request,) = service.seen
    assert isinstance(request, ChatRequest)
    return request


def test_sampling_fields_are_passed_on_and_only_those_given() -> None:
    assert asked().sampling == {}
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 2.0,
        "seed": 3,
        "stop": ["a", "b"],
    }
    assert asked(**given, top_k=-1, max_tokens=5).sampling == given | {"top_k": 0, "max_new_tokens": 5}
    assert asked(max_completion_tokens=6, max_tokens=6, stop="x").sampling == {"max_new_tokens": 6, "stop": "x"}
    assert asked(logprobs=True).sampling == {"logprobs": 0}
    assert refused(max_completion_tokens=6, max_tokens=5)["param"] == "max_completion_tokens"


def test_an_unknown_effort_is_refused_with_the_known_ones() -> None:
    error = refused(reasoning_effort="maximal")
    assert error["param"] == "reasoning_effort" and "none|minimal|low|medium|high|xhigh|max" in error["message"]


NUMBERS = {
    # field: (a value that works, the sampling argument that it becomes)
    "temperature": (0.5, "temperature"),
    "top_p": (0.5, "top_p"),
    "top_k": (5, "top_k"),
    "min_p": (0.5, "min_p"),
    "repetition_penalty": (1.5, "repetition_penalty"),
    "presence_penalty": (0.5, "presence_penalty"),
    "frequency_penalty": (0.5, "frequency_penalty"),
    "seed": (5, "seed"),
    "max_tokens": (5, "max_new_tokens"),
    "max_completion_tokens": (5, "max_new_tokens"),
    "top_logprobs": (5, "logprobs"),
    "n": (2, None),
    "thinking.budget_tokens": (5, None),
}
IMPOSSIBLE = ["NaN", "Infinity", "1e400", "9223372036854775808", "true", '"1"', "[]"]
ODD = ["-1", "0", "1.5", "2147483648"]


@pytest.mark.parametrize("field", NUMBERS)
def test_odd_numbers_are_refused_or_understood_by_the_sampler(field: str) -> None:
    works, argument = NUMBERS[field]
    for value in [str(works), "null", *ODD, *IMPOSSIBLE]:
        outer, _, inner = field.partition(".")
        number = f'{{"type": "enabled", "{inner}": {value}}}' if inner else value
        service = played(*HELLO)
        response = post(
            service,
            CHAT,
            f'{{"messages": [{{"role": "user", "content": "hi"}}], "logprobs": true, "{outer}": {number}}}',
        )
        if value not in ODD:
            assert response.status_code == (400 if value in IMPOSSIBLE else 200), value
        if response.status_code == 200:
            request = service.seen[0]
            SamplingParams(**request.sampling)  # what we let through, the sampler takes
            assert argument is None or value != str(works) or request.sampling[argument] == works
        else:
            assert response.status_code == 400, value
            if value not in ("NaN", "Infinity"):  # which are not JSON: no field is known yet
                assert outer in response.json()["error"]["param"], value


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"guided_json": {}}, "guided_json"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
        ({"stream_options": {"x": 1}}, "x"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"functions": [{"name": "f"}]}, "use tools"),
        ({"function_call": "auto"}, "use tool_choice"),
        ({"store": True}, "nothing is stored"),
        ({"modalities": ["audio"]}, "text"),
        ({"verbosity": "low"}, "medium"),
        ({"top_logprobs": 3}, "logprobs: true"),
        ({"top_logprobs": 21, "logprobs": True}, "20"),
        ({"n": 17}, "16"),
        ({"n": 2, "indexshare": {"selected": True}}, "n = 1"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 4097}, "4096"),
        ({"messages": [{"role": "owner", "content": "x"}]}, "messages[0]"),
        ({"messages": [*USER, {"role": "user"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "mood"),
        ({"tools": [WEATHER] * 513}, "512"),
        ({"tools": [{"type": "retrieval"}]}, "function"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "name"),
        ({"tool_choice": "any", "tools": [WEATHER]}, "required"),
        ({"tool_choice": "required"}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [WEATHER]}, "'f'"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}, "tools": [WEATHER]}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "not both"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"thinking": {"type": "maybe"}}, "enabled"),
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, "enable_thinking"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "16"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    assert words in refused(**fields)["message"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "image", "file"])
def test_media_are_refused_and_nothing_is_fetched(kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://169.254.169.254/latest"}}
    error = refused(messages=[{"role": "user", "content": [{"type": "text", "text": "look"}, part]}])
    assert "never fetched" in error["message"] and error["param"] == "messages[0].content"


def test_fields_that_change_nothing_are_accepted_and_null_is_absent() -> None:
    ignored = {
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "store": False,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "x"},
        "verbosity": "medium",
        "modalities": ["text"],
        "logit_bias": {},
    }
    nulls = dict.fromkeys(
        (
            "temperature",
            "stop",
            "tools",
            "tool_choice",
            "response_format",
            "max_tokens",
            "stream",
            "stream_options",
            "n",
        )
    )
    assert asked(**ignored, **nulls) == asked()


def test_messages_are_normalised() -> None:
    sent = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": None, "refusal": None, "reasoning": "because", "tool_calls": []},
        {"role": "user", "content": "go on", "name": "Ann"},
    ]
    assert asked(messages=sent).messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "reasoning_content": "because"},
        {"role": "user", "content": "go on", "name": "Ann"},
    ]


def test_tools_are_passed_on_without_nulls_and_in_one_order() -> None:
    tool = {"function": {"parameters": {"b": 1, "a": 2}, "description": None, "name": "f"}, "type": "function"}
    (seen,) = asked(tools=[tool]).tools
    assert json.dumps(seen) == '{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}'


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        ({"type": "function", "function": {"name": "weather"}}, ToolChoice(mode="required", name="weather")),
    ],
)
def test_tool_choice(choice: object, expected: ToolChoice) -> None:
    assert asked(tools=[WEATHER], tool_choice=choice).tool_choice == expected
    assert not asked(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False).tool_choice.parallel


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, OutputFormat(kind="json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            OutputFormat(kind="json_schema", definition=SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, OutputFormat(kind="json_schema", definition=SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, OutputFormat(kind="json_object")),
        ({"structured_outputs": {"regex": "a+"}}, OutputFormat(kind="regex", definition="a+")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, OutputFormat(kind="grammar", definition='start: "a"')),
        ({"structured_outputs": {"choice": ["a.b", "c"]}}, OutputFormat(kind="regex", definition=r"(?:a\.b|c)")),
    ],
)
def test_output_formats(fields: dict[str, Any], expected: OutputFormat | None) -> None:
    assert asked(**fields).output_format == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, None, None, None)),
        ({"reasoning_effort": "max"}, ("max", None, None, None)),
        ({"enable_thinking": False, "clear_thinking": False}, (None, False, None, False)),
        ({"thinking": {"type": "enabled", "budget_tokens": 9, "clear_thinking": False}}, (None, True, 9, False)),
        ({"thinking": {"type": "disabled", "budget_tokens": 9}}, (None, False, None, None)),
        (
            {"chat_template_kwargs": {"enable_thinking": True, "clear_thinking": True, "reasoning_effort": "high"}},
            ("high", True, None, True),
        ),
    ],
)
def test_thinking(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    request = asked(**fields)
    thinking = (request.reasoning_effort, request.enable_thinking, request.thinking_budget, request.clear_thinking)
    assert thinking == expected


def test_the_tenant_is_passed_on() -> None:
    service = played(*HELLO)
    asyncio.run(post_as(routes, service, CHAT, {"messages": USER}, tenant="key-1"))
    assert service.tenants == ["key-1"]
