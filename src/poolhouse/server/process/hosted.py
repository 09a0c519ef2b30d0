"""The application under somebody else's server, which may tell it of start and end (ASGI's lifespan) or not."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.engine.interface import PoolingEngine
from poolhouse.errors import PoolhouseError
from poolhouse.server.app import create_app
from poolhouse.server.process.connections import Edge
from poolhouse.server.routing import Addressed
from poolhouse.server.security import api_keys, is_probe
from poolhouse.server.telemetry.logs import RequestLog
from poolhouse.server.wire.errors import SHAPES
from poolhouse.server.wire.probes import turn_away
from poolhouse.settings import ServerSettings

log = logging.getLogger("poolhouse")


def hosted(open_engines: Callable[[], Sequence[PoolingEngine]], settings: ServerSettings) -> ASGIApp:
    """An application over engines that are opened when it is started, or first asked.

    Raises:
        ConfigError: keys that cannot be used.
    """
    api_keys(settings)
    return Addressed(Edge(Hosted(open_engines, settings)), settings.root_path)


class Hosted:
    """Loads by itself, and holds what it has loaded.

    Requests that come meanwhile wait; probes do not. What fails to load is tried again with the next request. A copy, by
    pickle or `copy`, is one that has not loaded.
    """

    def __init__(self, open_engines: Callable[[], Sequence[PoolingEngine]], settings: ServerSettings) -> None:
        self.open_engines = open_engines
        self.settings = settings
        self.application: ASGIApp | None = None
        self._loading: Future[ASGIApp] | None = None
        self._lock = threading.Lock()
        # Replies show the id of their request, from before there is an application too.
        self._waiting = RequestLog(self._answer, enabled=False)

    def __reduce__(self) -> Any:
        return Hosted, (self.open_engines, self.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif self.application is not None:
            await self.application(scope, receive, send)
        elif scope["type"] == "http":
            await self._wait(scope, receive, send)

    async def _wait(self, scope: Scope, receive: Receive, send: Send) -> None:
        loading = asyncio.wrap_future(self._begin())
        if not is_probe(scope):
            await asyncio.wait([loading])
        if loading.done() and loading.exception() is None:
            await loading.result()(scope, receive, send)
        else:
            await self._waiting(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        words = "The model is being loaded; ask again soon."
        if self._loading is not None and _failed(self._loading):
            words = "The model could not be loaded; the log says why."
        await turn_away(scope, receive, send, SHAPES[self.settings.error_format], "loading", words)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell the server that we have started when we have; then run the application's own start and end."""
        await receive()
        try:
            application = await asyncio.wrap_future(self._begin())
        except Exception as error:  # noqa: BLE001 - the server shows it and ends
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            return
        first = [{"type": "lifespan.startup"}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        try:
            await application(scope, again, send)
        finally:
            # Its engines are closed; who starts it again gets new ones.
            self.application = self._loading = None

    def _begin(self) -> Future[ASGIApp]:
        """Start to load, once."""
        with self._lock:
            if self._loading is None or _failed(self._loading):
                self._loading = Future()
                # So that a client which hangs up while it waits does not cancel it.
                self._loading.set_running_or_notify_cancel()
                threading.Thread(target=self._load, args=(self._loading,), name="poolhouse-load", daemon=True).start()
            return self._loading

    def _load(self, loading: Future[ASGIApp]) -> None:
        try:
            engines = self.open_engines()
            for engine in engines:
                engine.warm_up(self.settings.warmup)
            self.application = create_app(engines, self.settings)
        except BaseException as error:
            expected = isinstance(error, PoolhouseError | OSError)
            log.error("The model could not be loaded: %s", error, exc_info=None if expected else error)
            loading.set_exception(error)
        else:
            loading.set_result(self.application)


def _failed(loading: Future[ASGIApp]) -> bool:
    return loading.done() and loading.exception() is not None
