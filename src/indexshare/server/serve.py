"""`indexshare serve`: a model, its engine and the HTTP server around them, from start to end."""

import asyncio
import logging
from collections.abc import Callable

from indexshare.engine.engine import EngineOptions
from indexshare.engine.llm import LLM
from indexshare.errors import IndexShareError
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.metrics import Metrics
from indexshare.server.protocol import make_server
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
    """Serve until SIGINT or SIGTERM, then let running replies finish. `load` runs while the server already answers
    /health. Raises what loading raises."""
    service = EngineService(load, options, model_names=model_names, shares_prefixes=shares_prefixes)
    asyncio.run(_serve(service, options, settings))


async def _serve(service: EngineService, options: EngineOptions, settings: ServerSettings) -> None:
    metrics = Metrics(service.stats)
    app = create_app(service, settings, metrics=metrics, readiness=lambda: service.not_ready)
    server = make_server(app, settings)
    serving = asyncio.create_task(server.serve())
    failure: BaseException | None = None
    try:
        logger.info("loading %s", service.model_names[0])
        await service.start()
        logger.info(
            "ready: http://%s:%d, %s, %s tokens of cache",
            settings.host,
            settings.port,
            service.model_names[0],
            f"{service.stats()['pages'] * options.page_size:,}",
        )
    except (IndexShareError, OSError, MemoryError) as error:
        failure = error
        server.should_exit = True
    await serving
    await service.close(drain_seconds=0.0 if server.force_exit else 1.0)
    if failure is not None:
        raise failure
