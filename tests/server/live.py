"""The shipped model behind the whole server, in this process."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx2

from indexshare.engine.engine import EngineOptions
from indexshare.engine.llm import LLM
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.metrics import Metrics
from indexshare.server.service import EngineService

T = TypeVar("T")


@asynccontextmanager
async def serving(llm: LLM, *, settings: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Any]:
    """A service whose engine runs in its thread, and a client of the application around it."""
    fields = {"cache_tokens": 16_384, "num_drafts": 2, **options}
    service = EngineService(lambda: llm, EngineOptions(**fields), model_names=("nano", "alias"))
    app = create_app(
        service,
        ServerSettings(**(settings or {})),
        metrics=Metrics(service.stats),
        readiness=lambda: service.not_ready,
    )
    await service.start()
    transport = httpx2.ASGITransport(app=app)
    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            yield service, client
    finally:
        await service.close(drain_seconds=0.0)
        stats = service.stats()
        assert stats["live_pages"] == 0 and stats["free_pages"] + stats["cached_pages"] == stats["pages"]
        assert not service._replies, "a reply was not forgotten"


def run(test: Callable[[], Awaitable[T]]) -> T:
    """Run an async test."""
    return asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]
