"""A server without a model that speaks what the page needs, so that the page is developed and tested in milliseconds.

    python tests/e2e/fake_server.py --port 8001

The page's files come from production code. The answer depends on the last message: see `plan`. Selections are made up,
but in the format of the real server: words of the prompt that resemble the word being written, and its neighbours.
"""

import argparse
import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from indexshare.server import page

LAYER_GROUPS = [{"indexer": 0, "layers": [0]}, {"indexer": 1, "layers": [1]}, {"indexer": 2, "layers": [2, 3, 4, 5]}]
TOP_K = 48  # words that each layer group selects

ENGLISH = (
    "The question is about the lighthouse. I look for the places that name its keeper.",
    "The keeper of the lighthouse was Ada Holm. She wrote the storm log every night:\n\n"
    "```\n22 November: wind from the north-west\n```\n\nThe lamp was never out.",
)
CHINESE = ("问题问的是灯塔。我查找提到守塔人的地方。", "灯塔的守塔人是林远。她每晚都写风暴日志，灯从未熄灭。")
HOSTILE = (
    "",
    "<img src=x onerror=\"document.title='broken'\"> `` a `code` <b>bold</b>\n"
    "````html\n<script>document.title='broken'</script>\n```",
)


@dataclass
class FakeState:
    """What tests change and look at. delay: seconds for each token; key: wanted as a bearer token when not empty."""

    delay: float = 0.003
    prefill: float = 0.0
    key: str = ""
    loading: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)


def tokens_of(text: str) -> list[str]:
    return re.findall(r"<\|?/?\w+\|?>|\s?[A-Za-z]+|\s?\d|\s|.", text)


def render(messages: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The prompt's text and where the messages lie in it, in bytes."""
    text, places = "[gMASK]<sop>", []
    for index, message in enumerate(messages):
        text += f"<|{message['role']}|>"
        start = len(text.encode())
        text += message["content"]
        places.append({"index": index, "role": message["role"], "start": start, "end": len(text.encode())})
    return text + "<|assistant|><think>", places


def merged(ranges: list[tuple[int, int]]) -> list[list[int]]:
    result: list[list[int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1][1] = max(end, result[-1][1])
        else:
            result.append([start, end])
    return result


class FakeSelection:
    """Selects for each generated token, over all text before it."""

    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        self.text, self.messages = render(messages)
        self.spans: list[tuple[int, int, str]] = []
        self.num_bytes = 0
        for word in tokens_of(self.text):
            self._append(word)
        self.prompt_bytes, self.index = self.num_bytes, 0

    def _append(self, text: str) -> None:
        end = self.num_bytes + len(text.encode())
        self.spans.append((self.num_bytes, end, text.strip().lower()))
        self.num_bytes = end

    def prompt(self) -> dict[str, Any]:
        prompt = {"text": self.text, "bytes": self.prompt_bytes, "messages": self.messages}
        return {"prompt": prompt, "layer_groups": LAYER_GROUPS}

    def token(self, text: str) -> dict[str, Any]:
        ranges = [self._ranges(text.strip().lower(), group) for group in range(len(LAYER_GROUPS))]
        token = {"index": self.index, "text": text, "ranges": ranges}
        self.index += 1
        self._append(text)
        return token

    def _ranges(self, word: str, group: int) -> list[list[int]] | None:
        if len(self.spans) <= TOP_K:
            return None
        chosen = set(range(2)) | set(range(len(self.spans) - 6 - 4 * group, len(self.spans)))
        alike = [i for i, span in enumerate(self.spans) if span[2] == word and len(word) > (0 if group else 3)]
        for i in alike[-12:]:
            chosen.update(range(max(0, i - 1 - group), min(len(self.spans), i + 2 + group)))
        seed = self.index * 31 + group * 7
        chosen.update((seed * 97 + j * j * 13) % len(self.spans) for j in range(TOP_K - min(len(chosen), TOP_K)))
        return merged([self.spans[i][:2] for i in chosen])


def plan(text: str) -> tuple[str, str]:
    """Reasoning and answer to a message."""
    if "hostile" in text:
        return HOSTILE
    if "only think" in text:
        return ENGLISH[0], ""
    return CHINESE if re.search("[一-鿿]", text) else ENGLISH


def routes(state: FakeState) -> list[Route]:
    def error(status: int, message: str, code: str | None = None, **headers: str) -> Response:
        return JSONResponse({"error": {"message": message, "code": code, "param": None}}, status, headers)

    def refused(request: Request) -> bool:
        return bool(state.key) and request.headers.get("authorization") != f"Bearer {state.key}"

    async def ready(request: Request) -> Response:
        if refused(request):
            return error(401, "no key")
        return JSONResponse({"reason": state.loading}, 503) if state.loading else JSONResponse({"ready": True})

    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": "fake-glm", "object": "model", "max_model_len": 131072}]})

    async def chat(request: Request) -> Response:
        if refused(request):
            return error(401, "no key")
        body = json.loads(await request.body())
        state.requests.append(body)
        last = body["messages"][-1]["content"]
        if "too long" in last:
            return error(400, "1200000 tokens, but the model has 131072", "context_length_exceeded")
        if "busy" in last:
            return error(429, "12 requests are waiting", "overloaded", **{"retry-after": "7"})
        return StreamingResponse(stream(body, last, state), media_type="text/event-stream")

    return [
        *page.routes(),
        Route("/ready", ready),
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


async def stream(body: dict[str, Any], last: str, state: FakeState) -> AsyncIterator[str]:
    def event(delta: dict[str, Any] | None, **more: Any) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": more.pop("finish", None)}]
        return f"data: {json.dumps({'choices': choices, **more})}\n\n"

    reasoning, answer = plan(last)
    if body.get("enable_thinking") is False:
        reasoning = ""
    selection = FakeSelection(body["messages"]) if body.get("indexshare") else None
    pieces = [("reasoning_content", token) for token in tokens_of(reasoning)]
    pieces += [("", "</think>")] + [("content", token) for token in tokens_of(answer)] * (20 if "slow" in last else 1)
    try:
        await asyncio.sleep(state.prefill)
        more = {"indexshare": {"selected": selection.prompt()}} if selection else {}
        yield event({"role": "assistant", "content": ""}, **more)
        for number, (kind, token) in enumerate(pieces[: body.get("max_tokens")]):
            if "fail in the middle" in last and number == 25:
                yield f"data: {json.dumps({'error': {'message': 'a worker has ended'}})}\n\n"
                return
            more = {"indexshare": {"selected": {"tokens": [selection.token(token)]}}} if selection else {}
            yield event({kind: token} if kind else {}, **more)
            await asyncio.sleep(state.delay)
        was_cut = len(pieces) > body.get("max_tokens", len(pieces))
        yield event({}, finish="length" if was_cut else "stop")
        num_prompt = len(tokens_of(render(body["messages"])[0]))
        details = {"completion_tokens_details": {"reasoning_tokens": len(tokens_of(reasoning))}}
        cached = {"prompt_tokens_details": {"cached_tokens": num_prompt // 2}}
        yield event(None, usage={"prompt_tokens": num_prompt, "completion_tokens": len(pieces), **cached, **details})
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        state.cancelled.set()
        raise


@contextmanager
def running(state: FakeState, port: int = 0) -> Iterator[str]:
    """Serve in a thread on 127.0.0.1; gives the base URL."""
    config = uvicorn.Config(Starlette(routes=routes(state)), host="127.0.0.1", port=port, log_level="warning")
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    listener.listen()  # a browser may come before the thread is so far
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--port", type=int, default=8001)
    arguments.add_argument("--delay", type=float, default=0.03, help="seconds for each token")
    options = arguments.parse_args()
    with running(FakeState(delay=options.delay, prefill=0.5), options.port) as url:
        print(f"{url} (end with Ctrl-C)")
        threading.Event().wait()
