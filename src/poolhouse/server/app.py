"""The application: dialects over engines, with one way to count and one way to fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.engine.interface import PoolingEngine
from poolhouse.server import collectors, openapi, security
from poolhouse.server.dialects import DIALECTS
from poolhouse.server.engines import Engines, with_adapters
from poolhouse.server.routing import Addressed, Dialect, Dispatch, Heads
from poolhouse.server.telemetry import logs, tracing
from poolhouse.server.telemetry.metrics import Metrics
from poolhouse.server.wire import errors
from poolhouse.settings import ServerSettings


def create_app(
    engines: Sequence[PoolingEngine], settings: ServerSettings | None = None, dialects: Sequence[Dialect] = DIALECTS
) -> ASGIApp:
    """The HTTP application over these engines; it closes them when it is shut down."""
    settings = settings or ServerSettings()
    traces = tracing.open_traces(settings)
    served = Engines(with_adapters(engines), settings, Metrics())
    collectors.register(served)
    for engine in engines:
        engine.observe(served.metrics.engine(engine.facts.name))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        for engine in engines:
            await asyncio.to_thread(engine.close, settings.shutdown_seconds)
        if traces is not None:
            await asyncio.to_thread(traces.close)

    answering = errors.Answering(errors.SHAPES[settings.error_format], served.tasks_in_words)
    pages = () if settings.disable_fastapi_docs else (openapi.dialect(dialects, settings),)
    dispatch = Dispatch(Starlette(lifespan=lifespan), (*dialects, *pages), served, answering)
    guarded = security.guarded(dispatch, settings)
    counted = Counting(Heads(guarded), served.metrics)
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
