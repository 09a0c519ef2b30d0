"""The application: dialects over engines, with one way to count and one way to fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import poolhouse
from poolhouse.engine.interface import PoolingEngine
from poolhouse.server import collectors, openapi, routing, security
from poolhouse.server.dialects import routers, shapes
from poolhouse.server.engines import Serving, with_adapters
from poolhouse.server.routing import Addressed, Dispatch, Heads
from poolhouse.server.telemetry import logs, tracing
from poolhouse.server.telemetry.metrics import Metrics
from poolhouse.server.wire import errors
from poolhouse.settings import ServerSettings


def create_app(engines: Sequence[PoolingEngine], settings: ServerSettings | None = None) -> ASGIApp:
    """The HTTP application over these engines; it closes them when it is shut down."""
    settings = settings or ServerSettings()
    traces = tracing.open_traces(settings)
    serving = Serving(with_adapters(engines), settings, Metrics())
    collectors.register(serving)
    for engine in engines:
        engine.observe(serving.metrics.engine(engine.facts.name))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for engine in engines:
            await asyncio.to_thread(engine.close, settings.shutdown_seconds)
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="Poolhouse",
        version=poolhouse.__version__,
        lifespan=lifespan,
        openapi_url=None,
    )
    answering = errors.Answering(errors.SHAPES[settings.error_format], serving.tasks_in_words)
    dialects = routers(serving)
    pages = [] if settings.disable_fastapi_docs else [openapi.router(dialects, settings)]
    for router in (*dialects, *pages):
        app.include_router(router)
    errors.install(app, answering)
    routing.install(app, (*dialects, *pages), answering, shapes())
    guarded = security.guarded(Dispatch(app, dialects, answering), settings)
    counted = Counting(Heads(guarded), serving.metrics)
    logged = logs.logged(counted if traces is None else tracing.Traced(counted, traces), settings)
    return Addressed(logged, settings.root_path)


class Counting:
    """Counts and times every request."""

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
        self.metrics.in_flight += 1
        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.in_flight -= 1
            self.metrics.ended(scope, status, time.perf_counter() - started)
