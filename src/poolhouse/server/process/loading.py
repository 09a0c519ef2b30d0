"""Loading and stopping: what an application answers before its models are there, and once its server stops."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import EngineClosed, PoolhouseError
from poolhouse.server.app import create_app
from poolhouse.server.models_dir import ModelsDir
from poolhouse.server.on_demand import STOPPED, OnDemand
from poolhouse.server.page import Page
from poolhouse.server.process.connections import Edge
from poolhouse.server.routing import Addressed
from poolhouse.server.security import api_keys, is_probe
from poolhouse.server.telemetry.observer import RequestObserver
from poolhouse.server.wire.errors import SHAPES, Shape
from poolhouse.server.wire.probes import turn_away
from poolhouse.settings import ServerSettings

log = logging.getLogger("poolhouse")


def hosted(
    open_engines: Callable[[], Sequence[PoolingEngine]], settings: ServerSettings, models_dir: ModelsDir | None = None
) -> ASGIApp:
    """An application for another server than ours; its engines are opened when it is started, or at the first request.

    Raises:
        ConfigError: keys that cannot be used.
    """
    api_keys(settings)
    return Addressed(Edge(Hosted(open_engines, settings, models_dir)), settings.root_path)


class Loading:
    """An ASGI application whose inside is loaded by a thread; until then requests get 503.

    load: builds the application. application: None until it takes requests.
    """

    def __init__(self, load: Callable[[], ASGIApp], settings: ServerSettings) -> None:
        self.load = load
        self.settings = settings
        self.shape: Shape = SHAPES[settings.error_format]
        self.application: ASGIApp | None = None
        self.thread: threading.Thread | None = None
        self._loading: Future[ASGIApp] | None = None
        self._lock = threading.Lock()
        # Replies show the id of their request; a line in the log for each probe would be too much.
        self._unloaded = RequestObserver(Page(self._answer) if settings.page else self._answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await self._live(scope, receive, send)
        elif self.application is not None:
            await self.application(scope, receive, send)
        elif scope["type"] == "http":
            await self._early(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take part in the start and the end of the server (ASGI's lifespan)."""
        raise NotImplementedError

    async def _early(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that comes before the application is there."""
        await self._unloaded(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = "The model is being loaded; ask again soon."
        if self._loading is not None and _failed(self._loading):
            message = "The model could not be loaded; the log says why."
        await turn_away(scope, receive, send, self.shape, "loading", message)

    def _begin(self) -> asyncio.Future[ASGIApp]:
        """Start to load, once; what failed is tried again."""
        with self._lock:
            if self._loading is None or _failed(self._loading):
                self._loading = Future()
                # So that a client which hangs up while it waits does not cancel it.
                self._loading.set_running_or_notify_cancel()
                arguments = (self._loading,)
                self.thread = threading.Thread(target=self._load, args=arguments, name="poolhouse-load", daemon=True)
                self.thread.start()
            return asyncio.wrap_future(self._loading)

    def _load(self, loading: Future[ASGIApp]) -> None:
        try:
            loading.set_result(self.load())
        except BaseException as error:  # noqa: BLE001 - whoever waits raises it
            loading.set_exception(error)


def _failed(loading: Future[ASGIApp]) -> bool:
    return loading.done() and loading.exception() is not None


class Starting(Loading):
    """Under our own server, which takes requests at once.

    ready: called once the application answers. failed: called with the error where it cannot be built, or cannot start.
    """

    def __init__(
        self,
        load: Callable[[], ASGIApp],
        settings: ServerSettings,
        ready: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        super().__init__(load, settings)
        self.ready = ready
        self.failed = failed

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell uvicorn at once that we have started; start the application when it is there."""
        await send({"type": "lifespan.startup.complete"})
        loading = self._begin()
        stopping = asyncio.ensure_future(receive())
        await asyncio.wait((stopping, loading), return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            try:
                await self._hand_over(loading.result(), scope, stopping, send)
                return
            except BaseException as error:
                if stopping.done():
                    raise
                self.failed(error)
        await stopping
        await send({"type": "lifespan.shutdown.complete"})

    async def _hand_over(
        self, application: ASGIApp, scope: Scope, stopping: asyncio.Future[Message], send: Send
    ) -> None:
        """Run the application's own lifespan within ours."""

        async def started(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.application = application
                self.ready()
            elif message["type"] == "lifespan.startup.failed":
                raise RuntimeError(f"The server could not start: {message.get('message', '')}")
            else:
                await send(message)

        await application(scope, _startup_then(lambda: stopping), started)


class Hosted(Loading):
    """Under another server, which may run its lifespan or not.

    Requests that come while it loads wait; probes do not. What fails to load is tried again with the next request. A
    copy, by pickle or `copy`, is one that has not loaded.
    """

    def __init__(
        self,
        open_engines: Callable[[], Sequence[PoolingEngine]],
        settings: ServerSettings,
        models_dir: ModelsDir | None = None,
    ) -> None:
        super().__init__(self._build, settings)
        self.open_engines = open_engines
        self.models_dir = models_dir

    def __reduce__(self) -> tuple[type[Hosted], tuple[object, ...]]:
        return Hosted, (self.open_engines, self.settings, self.models_dir)

    async def _early(self, scope: Scope, receive: Receive, send: Send) -> None:
        loading = self._begin()
        if not is_probe(scope):
            await asyncio.wait([loading])
        if loading.done() and loading.exception() is None:
            await loading.result()(scope, receive, send)
        else:
            await super()._early(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell the server that we have started when we have; then run the application's own start and end."""
        try:
            application = await self._begin()
        except Exception as error:  # noqa: BLE001 - the server shows it and ends
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            return
        try:
            await application(scope, _startup_then(receive), send)
        finally:
            # Its engines are closed; who starts it again gets new ones.
            self.application = self._loading = None

    def _build(self) -> ASGIApp:
        try:
            engines = self.open_engines()
            for engine in engines:
                engine.warm_up(self.settings.warmup)
            on_demand = None
            if self.models_dir is not None:
                on_demand = OnDemand.beside(engines, self.models_dir, self.settings)
            self.application = create_app(engines, self.settings, on_demand=on_demand)
        except BaseException as error:
            expected = isinstance(error, PoolhouseError | OSError)
            log.error("The model could not be loaded: %s", error, exc_info=None if expected else error)
            raise
        return self.application


def _startup_then(receive: Callable[[], Awaitable[Message]]) -> Receive:
    """The messages of a lifespan whose first one was read already."""
    first: list[Message] = [{"type": "lifespan.startup"}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


class Stopping:
    """An ASGI application that lets requests through to `app` until `begun` is set; those that come later get 503."""

    def __init__(self, app: ASGIApp, shape: Shape) -> None:
        self.app = app
        self.shape: Shape = shape
        self.begun = False
        self.in_flight = 0
        # What requests wait for.
        self.unanswered: set[asyncio.Future[list[Answer]]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self.begun:
            message = "The server is being stopped; ask another one, or ask again soon."
            await turn_away(scope, receive, send, self.shape, "stopping", message)
        else:
            await self._counted(scope, receive, send)

    def refuse_all(self) -> None:
        """Wait no longer for any answer: its request gets 503."""
        for answering in self.unanswered:
            if not answering.done():
                answering.set_exception(EngineClosed(STOPPED))

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through; it is in flight until its reply is there, read or not."""
        answered = False

        async def sent(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.body" and not message.get("more_body") and not answered:
                answered = True
                self.in_flight -= 1
            await send(message)

        self.in_flight += 1
        scope.setdefault("state", {})["unanswered"] = self.unanswered
        try:
            await self.app(scope, receive, sent)
        finally:
            if not answered:
                self.in_flight -= 1
