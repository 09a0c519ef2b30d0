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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.types import ASGIApp

from poolhouse.engine.interface import PoolingEngine, Replicated
from poolhouse.server import openapi, security
from poolhouse.server.batches.lines import Requester
from poolhouse.server.batches.store import Store
from poolhouse.server.dialects import DIALECTS, batches
from poolhouse.server.engines import Engines, with_adapters
from poolhouse.server.on_demand import OnDemand
from poolhouse.server.page import Page
from poolhouse.server.routing import Addressed, Dialect, Dispatch, Heads
from poolhouse.server.served import Served
from poolhouse.server.telemetry import tracing
from poolhouse.server.telemetry.logs import RequestLog
from poolhouse.server.telemetry.metrics import Metrics, Queue
from poolhouse.server.telemetry.observer import Listener, RequestObserver
from poolhouse.server.wire import errors
from poolhouse.settings import ServerSettings


def create_app(
    engines: Sequence[PoolingEngine],
    settings: ServerSettings | None = None,
    dialects: Sequence[Dialect] = DIALECTS,
    on_demand: OnDemand | None = None,
) -> ASGIApp:
    """The HTTP application over these engines, and models on demand; it closes them when it is shut down."""
    settings = settings or ServerSettings()
    traces = tracing.open_traces(settings)
    served = Engines(with_adapters(engines), settings, Metrics(), on_demand)
    served.metrics.follow(map(_queue, served.always))
    if on_demand is not None:
        on_demand.report_to(served.metrics)
    served.metrics.follow_replicas({one.facts.name: one for one in engines if isinstance(one, Replicated)})
    for engine in engines:
        engine.observe(served.metrics.engine(engine.facts.name))
    store = None if settings.batch_dir is None else Store(Path(settings.batch_dir), settings, _alive(engines))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if store is not None:
            await store.start()
        yield
        if store is not None:
            await store.stop()
        for engine in engines:
            await asyncio.to_thread(engine.close, settings.shutdown_seconds)
        if on_demand is not None:
            await on_demand.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    dialects = (*dialects, batches.dialect(store, dialects))
    pages = () if settings.disable_fastapi_docs else (openapi.dialect(dialects, settings),)
    dispatch = Dispatch(Starlette(lifespan=lifespan), (*dialects, *pages), served, _answering(served))
    if store is not None:
        store.app = RequestObserver(dispatch)
    guarded = security.guarded(dispatch, settings)
    shown = Page(guarded) if settings.page else guarded
    listeners: list[Listener] = [served.metrics, *([] if traces is None else [traces]), RequestLog(settings)]
    return Addressed(RequestObserver(Heads(shown), listeners), settings.root_path)


def requester(engines: Sequence[PoolingEngine], settings: ServerSettings) -> Requester:
    """Answers the lines of batch files by the same routes, for a caller without a server."""
    served = Engines(with_adapters(engines), settings, Metrics())
    dispatch = Dispatch(Starlette(), DIALECTS, served, _answering(served))
    return Requester(RequestObserver(dispatch), _alive(engines))


def _answering(served: Engines) -> errors.Answering:
    return errors.Answering(errors.SHAPES[served.settings.error_format], served.tasks_by_model)


def _alive(engines: Sequence[PoolingEngine]) -> Callable[[], bool]:
    return lambda: all(engine.alive for engine in engines)


def _queue(served: Served) -> Queue:
    engine = served.engine
    parent = engine.facts.parent or served.name
    return Queue(served.name, parent, lambda: served.admission.waiting, lambda: engine.running)
