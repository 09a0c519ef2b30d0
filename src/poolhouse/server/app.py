"""The application: dialects over engines, with one way to count and one way to fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import poolhouse
from poolhouse.server import errors, logs, openapi, security
from poolhouse.server.adapted import with_adapters
from poolhouse.server.dialects import routers
from poolhouse.server.dispatch import Dispatch, Prefixed
from poolhouse.server.metrics import Metrics
from poolhouse.server.serving import Engine, Serving
from poolhouse.settings import ServerSettings


def create_app(engines: Sequence[Engine], settings: ServerSettings | None = None) -> ASGIApp:
    """The HTTP application over these engines; it closes them when it is shut down."""
    settings = settings or ServerSettings()
    serving = Serving(with_adapters(engines), settings, Metrics())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for engine in engines:
            await asyncio.to_thread(engine.close, settings.shutdown_seconds)

    app = FastAPI(
        title="Poolhouse",
        version=poolhouse.__version__,
        lifespan=lifespan,
        openapi_url=None,
    )
    # As an argument it is deprecated, for uvicorn's own prefix, which takes no request without it.
    app.root_path = settings.root_path
    answering = errors.Answering(errors.SHAPES[settings.error_format])
    dialects = routers(serving)
    for router in dialects:
        app.include_router(router)
    if not settings.disable_fastapi_docs:
        app.include_router(openapi.router(dialects, settings))
    errors.install(app, answering)
    guarded = security.guarded(Dispatch(app, dialects, answering), settings)
    logged = logs.logged(Counting(guarded, serving.metrics), settings)
    return Prefixed(logged, settings.root_path) if settings.root_path else logged


class Counting:
    """Counts and times every request by its route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.in_flight.dec()
            # Unknown paths share one name: a caller must not be able to grow the metrics.
            route = getattr(scope.get("route"), "path", "unknown")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)
