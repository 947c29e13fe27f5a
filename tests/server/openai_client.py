"""OpenAI's own client, in process, against the dialect in a bare application."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import openai
from server.dialects import http_client
from server.scripted import ScriptedService
from starlette.routing import Route

from indexshare.chat.types import Done, Start, Text
from indexshare.engine.sampler import SampledToken
from indexshare.server import chat_completions, completions, tokens
from indexshare.server.types import Piece, Service

CHAT = "/v1/chat/completions"
HELLO = (Piece(events=(Start(7),)), Piece(events=(Text("Hello"),)), Piece(events=(Done("stop"),)))
USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}, "strict": True},
}


def routes(service: Service) -> list[Route]:
    return [*chat_completions.routes(service), *completions.routes(service), *tokens.routes(service)]


def played(*pieces: Piece, prompt_tokens: tuple[SampledToken, ...] = ()) -> ScriptedService:
    """A service that answers every request with `pieces`."""
    return ScriptedService(lambda request: pieces, prompt_tokens=prompt_tokens)


def with_client(service: ScriptedService, action: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with http_client(routes, service) as http:
            return await action(
                openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", http_client=http, api_key="x", max_retries=0)
            )

    return asyncio.run(run())


def chat(service: ScriptedService, **fields: Any) -> Any:
    """The client's answer; a list of chunks when it is streamed."""

    async def action(client: openai.AsyncOpenAI) -> Any:
        answer = await client.chat.completions.create(**{"model": "scripted", "messages": USER} | fields)
        return [chunk async for chunk in answer] if fields.get("stream") else answer

    return with_client(service, action)


def complete(service: ScriptedService, **fields: Any) -> Any:
    """The client's answer; a list of chunks when it is streamed."""

    async def action(client: openai.AsyncOpenAI) -> Any:
        answer = await client.completions.create(**{"model": "scripted", "prompt": "hi"} | fields)
        return [chunk async for chunk in answer] if fields.get("stream") else answer

    return with_client(service, action)


def post(service: ScriptedService, path: str, body: str | dict[str, Any]) -> httpx2.Response:
    """The answer to `body`, which may be text that no client would send."""

    async def run() -> httpx2.Response:
        async with http_client(routes, service) as http:
            content = body if isinstance(body, str) else json.dumps(body)
            return await http.post(path, content=content, headers={"content-type": "application/json"})

    return asyncio.run(run())
