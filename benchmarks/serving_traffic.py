"""Mixed traffic for soak.py: requests whose greedy answers are known, and clients that send them in every manner.

Answers come from `LLM.generate` and `LLM.chat` without a server. Constrained ones have none there: the first answer of
the server is checked against its schema, and all later ones must be equal to it.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import jsonschema
import numpy as np

from indexshare.engine.llm import LLM
from indexshare.eval.documents import Library
from indexshare.train import corpus
from indexshare.train.tool_episodes import TALK, TOOLS

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MANNERS = {"whole": 30, "stream": 40, "slow": 10, "abort": 10, "bad": 10}  # percent
SLOW_SECONDS = 0.2
MAX_VIOLATIONS = 50
CODE_MODULES, CODE_LENGTHS, SHARED_LENGTH = 6, (40, 300, 1500), 1200
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer"},
        "found": {"type": "boolean"},
    },
    "required": ["name", "count", "found"],
    "additionalProperties": False,
}
BAD: tuple[tuple[int, str, Any], ...] = (
    (400, COMPLETIONS, {"prompt": "x", "no_such_field": 1}),
    (400, COMPLETIONS, {"prompt": "x", "temperature": "hot"}),
    (400, COMPLETIONS, {"prompt": ""}),
    (400, COMPLETIONS, {"prompt": "x", "max_tokens": 10_000_000}),
    (404, COMPLETIONS, {"prompt": "x", "model": "another"}),
    (400, CHAT, {"messages": []}),
    (400, CHAT, {"messages": [{"role": "nobody", "content": "x"}]}),
    (400, CHAT, {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}}),
    (400, CHAT, b'{"messages": ['),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client is told. calls: (name, arguments) of each tool call."""

    text: str
    reasoning: str = ""
    calls: tuple[tuple[str, Any], ...] = ()
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class Exchange:
    """A request without `stream`, and its greedy answer; None until the server has given the first one."""

    name: str
    path: str
    body: dict[str, Any]
    expected: Answer | None = None


@dataclass(slots=True, kw_only=True)
class Tally:
    """What happened. finished: complete answers by manner; statuses: by code; violations: what must not happen."""

    finished: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    num_violations: int = 0

    def violation(self, text: str) -> None:
        self.num_violations += 1
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(text)


def make_exchanges(llm: LLM, seed: int = 7) -> list[Exchange]:
    """Short and long prompts, shared beginnings, chats with and without thinking, tools and schemas."""
    found = []
    for index, token_ids in enumerate(_modules(llm)):
        for length in CODE_LENGTHS:
            limit = 24 + 8 * index
            found.append(_completion(llm, f"code {index}, {length} tokens", token_ids[:length], limit))
    shared = _modules(llm)[-1][:SHARED_LENGTH]
    for index in range(4):
        prompt = [*shared, *llm.tokenizer.encode(f"\n\ndef shared_{index}(")]
        found.append(_completion(llm, f"shared beginning {index}", prompt, 48))
    for index, (said, _) in enumerate(TALK[:6]):
        found.append(
            _chat(llm, f"talk {index}", [{"role": "user", "content": said}], 48, enable_thinking=index % 2 == 0)
        )
    generator = np.random.default_rng(seed)
    document = Library(llm.directory).document(generator, 1800, 4)
    for index, needle in enumerate(document.needles):
        found.append(_chat(llm, f"fact {index}", document.messages(needle.fact), 32, enable_thinking=False))
    tools = [tool.description for tool in TOOLS[:4]]
    for index, tool in enumerate(TOOLS[:4]):
        messages = [{"role": "user", "content": tool.make_use(generator).request}]
        found.append(_chat(llm, f"tool {index}", messages, 96, enable_thinking=False, tools=tools))
    for index, (said, _) in enumerate(TALK[:3]):
        body = _chat_body([{"role": "user", "content": said}], 64, enable_thinking=False)
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
        found.append(Exchange(name=f"schema {index}", path=CHAT, body=body))
    return found


def _modules(llm: LLM) -> list[list[int]]:
    texts = (corpus.read_text(path) for path in corpus.library_files())
    encoded = (llm.tokenizer.encode(text) for text in texts if len(text) > 12_000)
    return [token_ids for token_ids, _ in zip(encoded, range(CODE_MODULES), strict=False)]


def _completion(llm: LLM, name: str, prompt: Sequence[int], limit: int) -> Exchange:
    answer = llm.generate(prompt, max_new_tokens=limit)
    return Exchange(
        name=name,
        path=COMPLETIONS,
        body={"prompt": list(prompt), "max_tokens": limit, "temperature": 0},
        expected=Answer(text=answer.text, reason=answer.finish_reason),
    )


def _chat_body(messages: Sequence[dict[str, str]], limit: int, *, enable_thinking: bool) -> dict[str, Any]:
    return {"messages": messages, "max_tokens": limit, "temperature": 0, "enable_thinking": enable_thinking}


def _chat(
    llm: LLM,
    name: str,
    messages: Sequence[dict[str, str]],
    limit: int,
    *,
    enable_thinking: bool,
    tools: Sequence[dict[str, Any]] | None = None,
) -> Exchange:
    answer = llm.chat(messages, max_new_tokens=limit, temperature=0.0, enable_thinking=enable_thinking, tools=tools)
    return Exchange(
        name=name,
        path=CHAT,
        body=_chat_body(messages, limit, enable_thinking=enable_thinking) | ({"tools": tools} if tools else {}),
        expected=Answer(
            text=answer.content,
            reasoning=answer.reasoning_content or "",
            calls=tuple((call.name, dict(call.arguments)) for call in answer.tool_calls),
            reason=answer.finish_reason,
        ),
    )


async def run_client(port: int, key: str, exchanges: Sequence[Exchange], tally: Tally, seed: int, ends: float) -> None:
    """One request after the other until the loop's clock says `ends`."""
    rng, loop = random.Random(seed), asyncio.get_running_loop()
    async with open_client(port, key) as client:
        while loop.time() < ends:
            manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
            exchange = rng.choice(exchanges)
            try:
                if manner == "bad":
                    await send_bad(client, tally, rng)
                elif manner == "abort":
                    await abort(client, exchange, tally, rng)
                else:
                    answer = await ask(client, exchange, manner, tally)
                    if answer is not None:
                        tally.finished[manner] += 1
                        check(exchange, answer, tally)
            except httpx2.HTTPError as error:
                tally.violation(f"{exchange.name}, {manner}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.5)  # not thousands of them from a server that has gone


def open_client(port: int, key: str) -> httpx2.AsyncClient:
    headers = {"authorization": f"Bearer {key}"}
    return httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=300.0)


async def ask(client: httpx2.AsyncClient, exchange: Exchange, manner: str, tally: Tally) -> Answer | None:
    """The answer; None, and a violation, for a status other than 200 or a reply that broke off."""
    if manner == "whole":
        response = await client.post(exchange.path, json=exchange.body)
        tally.statuses[response.status_code] += 1
        if response.status_code == 200:
            return whole_answer(response.json())
        tally.violation(f"{exchange.name}: status {response.status_code}: {response.text[:300]}")
        return None
    async with client.stream("POST", exchange.path, json=exchange.body | {"stream": True}) as response:
        tally.statuses[response.status_code] += 1
        if response.status_code != 200:
            tally.violation(f"{exchange.name}: status {response.status_code}: {(await response.aread())[:300]!r}")
            return None
        chunks = []
        async for chunk in _chunks(response):
            chunks.append(chunk)
            if manner == "slow":
                await asyncio.sleep(SLOW_SECONDS)
    if not chunks or "error" in chunks[-1]:
        tally.violation(f"{exchange.name}, {manner}: the reply broke off: {chunks[-1:]}")
        return None
    return joined_answer(chunks)


async def _chunks(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def whole_answer(content: dict[str, Any]) -> Answer:
    """An answer that was not streamed, chat or completion."""
    choice = content["choices"][0]
    return _answer([choice.get("message") or {"content": choice["text"]}], choice["finish_reason"])


def joined_answer(chunks: Sequence[dict[str, Any]]) -> Answer:
    """The same from the chunks of a stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    parts = [choice.get("delta") or {"content": choice.get("text")} for choice in choices]
    return _answer(parts, reasons[0] if reasons else "")


def _answer(parts: Sequence[dict[str, Any]], reason: str) -> Answer:
    calls = [call["function"] for part in parts for call in part.get("tool_calls") or ()]
    return Answer(
        text="".join(part.get("content") or "" for part in parts),
        reasoning="".join(part.get("reasoning_content") or "" for part in parts),
        calls=tuple((call["name"], json.loads(call["arguments"])) for call in calls),
        reason=reason,
    )


def check(exchange: Exchange, answer: Answer, tally: Tally) -> None:
    """Equal to the greedy answer, or, the first time of a constrained one, what its schema says."""
    if exchange.expected is None:
        exchange.expected = answer
        if answer.reason == "stop":
            try:
                jsonschema.validate(json.loads(answer.text), SCHEMA)
            except (ValueError, jsonschema.ValidationError) as error:
                tally.violation(f"{exchange.name}: {answer.text!r} does not follow its schema: {error}")
    elif answer != exchange.expected:
        tally.violation(f"{exchange.name}: {answer} is not {exchange.expected}")


async def abort(client: httpx2.AsyncClient, exchange: Exchange, tally: Tally, rng: random.Random) -> None:
    """Go away: before the answer begins, or after some chunks."""
    wanted = rng.randrange(6)
    try:
        async with (
            asyncio.timeout(rng.uniform(0.0, 0.3) if wanted == 0 else None),
            client.stream("POST", exchange.path, json=exchange.body | {"stream": wanted > 0}) as response,
        ):
            tally.statuses[response.status_code] += 1
            async for _ in _chunks(response):
                wanted -= 1
                if wanted <= 0:
                    break
    except TimeoutError:
        pass  # this is the abort
    tally.finished["abort"] += 1


async def send_bad(client: httpx2.AsyncClient, tally: Tally, rng: random.Random) -> None:
    """Something that must be refused, with the right status."""
    if rng.random() < 0.1:
        expected, path, body, headers = 401, COMPLETIONS, {"prompt": "x"}, {"authorization": "Bearer nobody-knows-this"}
    else:
        (expected, path, body), headers = rng.choice(BAD), {}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await client.post(path, content=content, headers={"content-type": "application/json", **headers})
    tally.statuses[response.status_code] += 1
    tally.finished["bad"] += 1
    if response.status_code != expected:
        tally.violation(f"{body!r:.200}: status {response.status_code} and not {expected}: {response.text[:300]}")
