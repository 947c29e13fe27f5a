"""`indexshare serve`: a model, its engine and the HTTP server around them, from start to end."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable

from indexshare.engine.engine import EngineOptions
from indexshare.engine.llm import LLM
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.metrics import Metrics
from indexshare.server.protocol import listen, make_server
from indexshare.server.service import EngineService

logger = logging.getLogger("indexshare.server")


def serve_model(
    load: Callable[[], LLM],
    options: EngineOptions,
    settings: ServerSettings,
    *,
    model_names: tuple[str, ...],
    shares_prefixes: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM, then let running replies finish.

    `load` runs while the server already answers /health. Raises what loading raises, and ConfigError when the port
    cannot be used.
    """
    service = EngineService(load, options, model_names=model_names, shares_prefixes=shares_prefixes)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(service, settings))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop, which takes less time from the kernels; there is none for Windows."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


async def _serve(service: EngineService, settings: ServerSettings) -> None:
    metrics = Metrics(service.stats)
    app = create_app(service, settings, metrics=metrics, readiness=lambda: service.not_ready)
    server = make_server(app, settings)
    server.on_exit = lambda: service.close(drain_seconds=settings.drain_seconds)
    with listen(settings) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        host, port = listener.getsockname()[:2]
        name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        starting = asyncio.create_task(_start(service, f"http://{name}:{port}"))
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and starting.exception() is not None:
            server.should_exit = True
        await serving
    if not starting.done():
        # A signal while the model is loaded, which nothing can interrupt: what it holds ends with the process.
        logger.info("ended while the model was loading")
        logging.shutdown()
        os._exit(0)
    await service.close(drain_seconds=0.0)
    if (failure := starting.exception()) is not None:
        raise failure


async def _start(service: EngineService, address: str) -> None:
    logger.info("loading %s as %s", service.model_names[-1], service.model_names[0])
    await service.start()
    stats = service.stats()
    logger.info("cache: %s tokens, %s bytes at most", f"{service.context_length:,}", f"{stats['cache_bytes']:,}")
    logger.info(
        "ready: page %s/, OpenAI base URL %s/v1, Anthropic base URL %s, model %s",
        *(address, address, address, service.model_names[0]),
    )
