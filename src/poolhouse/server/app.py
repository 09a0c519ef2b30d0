"""App: the HTTP application; dialects over engines, with one way to observe requests and one way to fail.

A request goes through these, from the outside to the inside, and its reply back:

    Addressed        where the application is mounted, one path for each probe
    RequestObserver  the id; log, metrics and traces
    Heads            HEAD as GET without the body
    Page             the page for browsers, which needs no key
    security         limits on URL and headers, CORS, keys
    Dispatch         the route of the path; reads the body, checks its fields
    Route.answer     a function of a dialect: Call.use, Call.answers, Call.write
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.types import ASGIApp

from poolhouse.engine.interface import PoolingEngine
from poolhouse.server import openapi, security
from poolhouse.server.dialects import DIALECTS
from poolhouse.server.engines import Engines, with_adapters
from poolhouse.server.page import Page
from poolhouse.server.routing import Addressed, Dialect, Dispatch, Heads
from poolhouse.server.telemetry import tracing
from poolhouse.server.telemetry.logs import RequestLog
from poolhouse.server.telemetry.metrics import Metrics, Queue
from poolhouse.server.telemetry.observer import Listener, RequestObserver
from poolhouse.server.wire import errors
from poolhouse.settings import ServerSettings


def create_app(
    engines: Sequence[PoolingEngine], settings: ServerSettings | None = None, dialects: Sequence[Dialect] = DIALECTS
) -> ASGIApp:
    """The HTTP application over these engines; it closes them when it is shut down."""
    settings = settings or ServerSettings()
    traces = tracing.open_traces(settings)
    served = Engines(with_adapters(engines), settings, Metrics())
    served.metrics.follow(_queue(served, engine) for engine in served.by_name.values())
    for engine in engines:
        engine.observe(served.metrics.engine(engine.facts.name))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        for engine in engines:
            await asyncio.to_thread(engine.close, settings.shutdown_seconds)
        if traces is not None:
            await asyncio.to_thread(traces.close)

    answering = errors.Answering(errors.SHAPES[settings.error_format], served.tasks_by_model)
    pages = () if settings.disable_fastapi_docs else (openapi.dialect(dialects, settings),)
    dispatch = Dispatch(Starlette(lifespan=lifespan), (*dialects, *pages), served, answering)
    guarded = security.guarded(dispatch, settings)
    shown = Page(guarded) if settings.page else guarded
    listeners: list[Listener] = [served.metrics, *([] if traces is None else [traces]), RequestLog(settings)]
    return Addressed(RequestObserver(Heads(shown), listeners), settings.root_path)


def _queue(served: Engines, engine: PoolingEngine) -> Queue:
    facts = engine.facts
    return Queue(facts.name, facts.parent or facts.name, lambda: served.waiting(engine), lambda: engine.running)
