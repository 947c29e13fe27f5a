"""The dialects, the service and the engine together on the shipped model: what clients get is what the model says."""

import asyncio
import json
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from server.live import run, serving

from indexshare.chat.types import Done, Reasoning, Text, ToolCallEvent
from indexshare.engine.llm import LLM
from indexshare.engine.reply import chat_prompt
from indexshare.errors import IndexShareError, MemoryLimitError, RequestError
from indexshare.server.reading import ReadingReport
from indexshare.server.system_prompt import stable
from indexshare.server.types import ChatRequest, CompletionRequest, OutputFormat, ToolChoice

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 999}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


async def collect(reply: Any) -> dict[str, Any]:
    """Everything in a reply."""
    found: dict[str, Any] = {"text": "", "reasoning": "", "calls": [], "selections": [], "tokens": []}
    async with aclosing(reply.pieces()) as pieces:
        async for piece in pieces:
            for event in piece.events:
                match event:
                    case Text(text):
                        found["text"] += text
                    case Reasoning(text):
                        found["reasoning"] += text
                    case ToolCallEvent():
                        found["calls"].append(event)
                    case Done(reason, usage, stop_text):
                        found |= {"reason": reason, "usage": usage, "stop_text": stop_text}
            found["tokens"] += piece.tokens
            if piece.selection is not None:
                found["selections"].append(piece.selection)
    return found


def ask(nano: LLM, *requests: ChatRequest | CompletionRequest, **options: Any) -> list[dict[str, Any]]:
    """Requests one after the other on one server."""

    async def go() -> list[dict[str, Any]]:
        async with serving(nano, **options) as (service, _):
            results = []
            for request in requests:
                send = service.chat if isinstance(request, ChatRequest) else service.complete
                results.append(await collect(await send(request, tenant="t")))
            return results

    return run(go)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_chat_is_what_the_python_api_says(nano: LLM, thinking: bool) -> None:
    reply = nano.chat(HELLO, enable_thinking=thinking, max_new_tokens=60, temperature=0.0)
    (served,) = ask(
        nano, ChatRequest(messages=HELLO, enable_thinking=thinking, sampling={"max_new_tokens": 60, "temperature": 0.0})
    )
    assert served["text"] == reply.content and (served["reasoning"] or None) == reply.reasoning_content
    assert served["reason"] == reply.finish_reason
    assert served["usage"].num_completion_tokens == reply.usage.num_completion_tokens


def test_a_seed_draws_what_the_python_api_draws(nano: LLM) -> None:
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 11}
    reply = nano.chat(HELLO, **options)
    (served,) = ask(nano, ChatRequest(messages=HELLO, sampling=options))
    assert (served["text"], served["reasoning"] or None) == (reply.content, reply.reasoning_content)


def test_stop_texts_end_a_reply(nano: LLM) -> None:
    sampling = {"max_new_tokens": 60, "temperature": 0.0, "stop": ["nano", "model"]}
    reply = nano.chat(HELLO, **sampling)
    (served,) = ask(nano, ChatRequest(messages=HELLO, sampling=sampling))
    assert served["text"] == reply.content and served["stop_text"] == "nano" and served["reason"] == "stop"


def test_a_schema_holds_after_thinking_and_with_drafts(nano: LLM) -> None:
    request = ChatRequest(
        messages=HELLO,
        output_format=OutputFormat(kind="json_schema", definition=SCHEMA),
        thinking_budget=5,
        sampling={"max_new_tokens": 300, "temperature": 0.0},
    )
    results = [ask(nano, request, num_drafts=drafts)[0] for drafts in (0, 3)]
    assert results[0]["text"] == results[1]["text"]
    jsonschema.validate(json.loads(results[0]["text"]), SCHEMA)
    assert results[0]["reason"] == "stop"


@pytest.mark.parametrize("choice", [ToolChoice(mode="required"), ToolChoice(mode="required", name="get_weather")])
@pytest.mark.parametrize("thinking", [True, False])
def test_required_tools_are_called_as_their_schema_says(nano: LLM, choice: ToolChoice, thinking: bool) -> None:
    request = ChatRequest(
        messages=HELLO,
        tools=[WEATHER],
        tool_choice=choice,
        enable_thinking=thinking,
        thinking_budget=20 if thinking else None,
        sampling={"max_new_tokens": 200, "temperature": 0.0},
    )
    (result,) = ask(nano, request, num_drafts=3)
    assert result["reason"] == "tool_calls" and result["calls"]
    for call in result["calls"]:
        jsonschema.validate(dict(call.arguments), WEATHER["function"]["parameters"])
    assert result["text"] == ""


def test_tools_that_must_not_be_called_are_not(nano: LLM) -> None:
    question = [{"role": "user", "content": "What is the weather in Rome?"}]
    request = ChatRequest(
        messages=question,
        tools=[WEATHER],
        tool_choice=ToolChoice(mode="none"),
        sampling={"max_new_tokens": 60, "temperature": 0.0},
    )
    (result,) = ask(nano, request)
    assert result["calls"] == []


@pytest.mark.parametrize("parallel", [True, False])
def test_with_tools_and_a_schema_the_reply_is_json_or_calls(nano: LLM, parallel: bool) -> None:
    requests = [
        ChatRequest(
            messages=HELLO,
            tools=[WEATHER],
            tool_choice=ToolChoice(parallel=parallel),
            output_format=OutputFormat(kind="json_schema", definition=SCHEMA),
            enable_thinking=False,
            # cool, the model calls the tool; hot, some replies are JSON
            sampling={"max_new_tokens": 300, "temperature": 8.0 if seed < 24 else 1.4, "top_k": 40, "seed": seed},
        )
        for seed in range(36)
    ]
    results = ask(nano, *requests)
    ended = [result for result in results if result["reason"] != "length"]
    assert len(ended) > 12  # hot ones seldom end
    assert 0 < sum(bool(result["calls"]) for result in ended) < len(ended)
    for result in ended:
        if result["calls"]:
            assert result["text"].strip() == "" and (parallel or len(result["calls"]) == 1)
        else:
            jsonschema.validate(json.loads(result["text"]), SCHEMA)


def test_what_does_not_go_together_is_refused(nano: LLM) -> None:
    formats = OutputFormat(kind="regex", definition="a+")
    for request in (
        ChatRequest(messages=HELLO, tools=[WEATHER], output_format=formats),
        ChatRequest(messages=HELLO, tools=[WEATHER], tool_choice=ToolChoice(mode="required"), output_format=formats),
    ):
        with pytest.raises(RequestError, match="format"):
            ask(nano, request)
    request = ChatRequest(
        messages=HELLO,
        tools=[{**WEATHER, "function": {**WEATHER["function"], "strict": True}}],
        tool_choice=ToolChoice(mode="none"),
        output_format=formats,
        enable_thinking=False,
        sampling={"max_new_tokens": 3},
    )
    assert set(ask(nano, request)[0]["text"]) == {"a"}


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_a_budget_closes_the_thinking_and_the_answer_comes(nano: LLM, budget: int) -> None:
    sampling = {"max_new_tokens": 80, "temperature": 0.0}
    free, limited = ask(
        nano,
        ChatRequest(messages=HELLO, sampling=sampling),
        ChatRequest(messages=HELLO, sampling=sampling, thinking_budget=budget),
    )
    assert len(nano.tokenizer.encode(free["reasoning"])) > budget
    assert len(nano.tokenizer.encode(limited["reasoning"])) <= budget and limited["text"]


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_reasoning_tokens_are_those_before_the_end_of_thinking(nano: LLM, num_drafts: int) -> None:
    sampling = {"max_new_tokens": 60, "temperature": 0.0, "logprobs": 0}
    think_end = nano.tokenizer.control_id("</think>")
    requests = [
        ChatRequest(messages=HELLO, sampling=sampling),
        ChatRequest(messages=HELLO, sampling=sampling, thinking_budget=3),
        ChatRequest(messages=HELLO, sampling=sampling, enable_thinking=False),
        ChatRequest(messages=HELLO, sampling=sampling, tools=[WEATHER], tool_choice=ToolChoice(mode="required")),
    ]
    for index, result in enumerate(ask(nano, *requests, num_drafts=num_drafts)):
        token_ids = [token.token_id for token in result["tokens"]]
        expected = 0 if index == 2 else token_ids.index(think_end) if think_end in token_ids else len(token_ids)
        assert result["usage"].num_reasoning_tokens == expected
        assert index != 1 or expected == 3


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
def test_every_known_effort_is_taken(nano: LLM, effort: str) -> None:
    request = ChatRequest(messages=HELLO, reasoning_effort=effort, sampling={"max_new_tokens": 60, "temperature": 0.0})
    (result,) = ask(nano, request)
    assert bool(result["reasoning"]) == (effort != "none")


def test_an_unknown_effort_is_refused(nano: LLM) -> None:
    with pytest.raises(RequestError, match="unknown reasoning_effort 'maximal'"):
        ask(nano, ChatRequest(messages=HELLO, reasoning_effort="maximal"))


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ChatRequest(messages=[]), IndexShareError),
        (ChatRequest(messages=HELLO, tool_choice=ToolChoice(mode="required")), RequestError),
        (ChatRequest(messages=HELLO, sampling={"max_new_tokens": 10**6}), MemoryLimitError),
        (ChatRequest(messages=HELLO, sampling={"temperature": float("nan")}), RequestError),
        (ChatRequest(messages=HELLO, output_format=OutputFormat(kind="regex", definition="(")), RequestError),
        (CompletionRequest(prompt=""), RequestError),
        (CompletionRequest(prompt=[0, 4096]), RequestError),
        (CompletionRequest(prompt=[-1]), RequestError),
        (CompletionRequest(prompt=[True]), RequestError),
        (CompletionRequest(prompt="x" * 40_000), MemoryLimitError),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(
    nano: LLM, request_: ChatRequest | CompletionRequest, error: type[Exception]
) -> None:
    with pytest.raises(error):
        ask(nano, request_)


def test_tenants_share_prefixes_with_themselves_only(nano: LLM) -> None:
    document = [{"role": "user", "content": "def f(x):\n    return x + 1\n" * 40}]
    request = ChatRequest(messages=document, sampling={"max_new_tokens": 4})

    async def go() -> list[int]:
        async with serving(nano) as (service, _):
            replies = []
            for tenant in ("one", "two", "one", "two"):
                replies.append((await collect(await service.chat(request, tenant=tenant)))["usage"])
            return [usage.num_cached_tokens for usage in replies]

    first, second, third, fourth = run(go)
    assert first == second == 0 and third == fourth > 400


def test_preserved_reasoning_keeps_the_prefix(nano: LLM) -> None:
    """A conversation goes on: with its reasoning sent back, all of it but the new message is cached."""

    async def go() -> tuple[int, int]:
        async with serving(nano) as (service, _):
            sampling = {"max_new_tokens": 60, "temperature": 0.0}
            request = ChatRequest(messages=HELLO, clear_thinking=False, sampling=sampling)
            first = await collect(await service.chat(request, tenant=""))
            answer = {"role": "assistant", "content": first["text"], "reasoning_content": first["reasoning"]}
            messages = [*HELLO, answer, {"role": "user", "content": "And what can you do?"}]
            again = ChatRequest(messages=messages, clear_thinking=False, sampling=sampling)
            usage = first["usage"]
            second = await collect(await service.chat(again, tenant=""))
            return usage.num_prompt_tokens + usage.num_completion_tokens, second["usage"].num_cached_tokens

    known, cached = run(go)
    assert known - 2 <= cached <= known


def test_what_was_read_comes_as_byte_ranges(nano: LLM) -> None:
    lines = [f"value_{n} = {n * 7919 % 10_007}  # é中" for n in range(60)]
    messages = [{"role": "user", "content": "\n".join(lines)}, {"role": "user", "content": "Say something."}]
    (result,) = ask(
        nano,
        ChatRequest(messages=messages, wants_selection=True, sampling={"max_new_tokens": 6, "temperature": 0.0}),
    )
    header, tokens = result["selections"][0], [token for part in result["selections"] for token in part["tokens"]]
    text = header["prompt"]["text"].encode()
    assert len(text) == header["prompt"]["bytes"]
    place = header["prompt"]["messages"][0]
    assert text[place["start"] : place["end"]].decode() == messages[0]["content"]
    assert [group["layers"][0] for group in header["layer_groups"]] == [
        group["indexer"] for group in header["layer_groups"]
    ]
    assert [token["index"] for token in tokens] == list(range(len(tokens)))
    limit = nano.config.index_topk
    for index, token in enumerate(tokens):
        for ranges in token["ranges"]:
            assert ranges is not None, "the context is longer than top-k"
            assert all(start < end for start, end in ranges)
            assert all(first[1] < second[0] for first, second in pairwise(ranges))
            inside = sum(min(end, len(text)) - min(start, len(text)) for start, end in ranges)
            assert limit // 2 < inside < len(text)
            written = sum(len(earlier["text"].encode()) for earlier in tokens[:index])
            assert ranges[-1][1] <= len(text) + written, "nothing is read before it is written"


def test_messages_are_found_where_they_stand(nano: LLM) -> None:
    messages = [
        {"role": "system", "content": "x-anthropic-billing-header: cch=1\nmax"},
        {"role": "user", "content": "s"},
        {"role": "assistant", "content": "user"},
        {"role": "user", "content": "o"},
        {"role": "assistant", "content": " changed by the template "},
        {"role": "user", "content": "é中"},
    ]
    prompt = chat_prompt(nano.tokenizer, nano.template, stable(messages))
    header = ReadingReport(nano.config, nano.tokenizer, prompt.token_ids, messages).header["prompt"]
    text = header["text"].encode()
    found = {place["index"]: (place["role"], place["start"], place["end"]) for place in header["messages"]}
    assert sorted(found) == [0, 1, 2, 3, 5]
    for index, (role, start, end) in found.items():
        if index > 0:
            assert text[start:end].decode() == messages[index]["content"]
            opener = {"user": b"<|user|>", "assistant": b"</think>"}[role]
            assert text[:start].endswith(opener)


def test_a_reply_with_what_was_read_is_bounded(nano: LLM) -> None:
    with pytest.raises(RequestError, match="ask for fewer tokens"):
        ask(
            nano,
            ChatRequest(messages=HELLO, wants_selection=True, sampling={"max_new_tokens": 10**6}),
            cache_tokens=2**21,
        )


def test_scores_of_a_prompt(nano: LLM) -> None:
    async def go() -> Any:
        async with serving(nano) as (service, _):
            request = CompletionRequest(
                prompt="def main() -> None:\n", echo=True, sampling={"max_new_tokens": 0, "logprobs": 1}
            )
            reply = await service.complete(request, tenant="")
            result = await collect(reply)
            return reply.prompt_tokens, result

    scored, result = run(go)
    token_ids = nano.tokenizer.encode("def main() -> None:\n")
    assert [token.token_id for token in scored] == token_ids and result["text"] == ""
    expected = nano.logprobs(token_ids).tolist()
    assert [token.logprob for token in scored[1:]] == pytest.approx(expected, abs=2e-2)


def test_a_client_that_leaves_frees_everything_at_once(nano: LLM) -> None:
    async def go() -> None:
        async with serving(nano) as (service, _):
            request = ChatRequest(messages=HELLO, sampling={"max_new_tokens": 4000, "stop": ["\0"], "temperature": 2.0})
            replies = [await service.chat(request, tenant="") for _ in range(5)]
            streams = [reply.pieces() for reply in replies]
            for stream in streams:
                await anext(stream)
            for stream in streams:
                await stream.aclose()
            for _ in range(500):
                if service.stats()["running"] == 0:
                    break
                await asyncio.sleep(0.01)
            assert service.stats()["running"] == 0 and not service._replies

    run(go)


def test_readiness_is_told_before_and_after(nano: LLM) -> None:
    async def go() -> None:
        async with serving(nano) as (service, client):
            assert (await client.get("/ready")).json() == {"ready": True, "reason": ""}
            await service.close(drain_seconds=0.0)
            answer = await client.get("/ready")
            assert answer.status_code == 503 and "shutting down" in answer.json()["reason"]
            refused = await client.post("/v1/chat/completions", json={"model": "nano", "messages": HELLO})
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0

    run(go)


def test_metrics_tell_what_happened(nano: LLM) -> None:
    async def go() -> str:
        async with serving(nano) as (_, client):
            body = {"model": "nano", "messages": HELLO, "max_tokens": 20}
            for _ in range(2):
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
            return (await client.get("/metrics")).text

    text = run(go)
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["indexshare_engine_requests_total"]) == 3  # with the one that warmed it up
    assert float(figures["indexshare_engine_cached_tokens_total"]) > 10
    assert any(name.startswith('indexshare_engine_accepted_total{position="0"') for name in figures)
    assert sum(float(value) for name, value in figures.items() if "expert_tokens_total" in name) > 100
    assert float(figures["indexshare_time_to_first_token_seconds_count"]) == 2
