"""The application: dialects over engines, with one way to count and one way to fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

import poolhouse
from poolhouse.engine.interface import PoolingEngine
from poolhouse.server import openapi, routing, security
from poolhouse.server.dialects import routers, shapes
from poolhouse.server.engines import Serving, with_adapters
from poolhouse.server.routing import Addressed, Dispatch, Heads
from poolhouse.server.telemetry import tracing
from poolhouse.server.telemetry.logs import RequestLog
from poolhouse.server.telemetry.metrics import Metrics, Queue
from poolhouse.server.telemetry.observer import Listener, RequestObserver
from poolhouse.server.wire import errors
from poolhouse.settings import ServerSettings


def create_app(engines: Sequence[PoolingEngine], settings: ServerSettings | None = None) -> ASGIApp:
    """The HTTP application over these engines; it closes them when it is shut down."""
    settings = settings or ServerSettings()
    traces = tracing.open_traces(settings)
    serving = Serving(with_adapters(engines), settings, Metrics())
    serving.metrics.follow(_queue(serving, engine) for engine in serving.engines.values())
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
    listeners: list[Listener] = [serving.metrics, *([] if traces is None else [traces]), RequestLog(settings)]
    return Addressed(RequestObserver(Heads(guarded), listeners), settings.root_path)


def _queue(serving: Serving, engine: PoolingEngine) -> Queue:
    facts = engine.facts
    return Queue(facts.name, facts.parent or facts.name, lambda: serving.waiting(engine), lambda: engine.running)
