"""Answers while models load; then the application takes over."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.server.telemetry.logs import RequestLog
from poolhouse.server.wire.errors import Shape
from poolhouse.server.wire.probes import turn_away


class Starting:
    """An ASGI application whose inside comes later.

    load: makes the application, in a thread of its own. ready: called once it answers. failed: called with the error
    where it cannot be made, or cannot start.
    """

    def __init__(
        self,
        load: Callable[[], ASGIApp],
        ready: Callable[[], None],
        failed: Callable[[BaseException], None],
        shape: Shape,
    ) -> None:
        self.load = load
        self.ready = ready
        self.failed = failed
        self.shape: Shape = shape
        self.application: ASGIApp | None = None
        # Replies show the id of their request; a line in the log for each probe would be too much.
        self.named = RequestLog(self._answer, enabled=False)
        self.thread = threading.Thread(target=self._load, name="poolhouse-load", daemon=True)
        self._loaded: Future[ASGIApp] = Future()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif self.application is not None:
            await self.application(scope, receive, send)
        elif scope["type"] == "http":
            await self.named(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = "The model is being loaded; ask again soon."
        await turn_away(scope, receive, send, self.shape, "loading", message)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """uvicorn hears at once that we have started; the application is started when it is there."""
        await receive()
        await send({"type": "lifespan.startup.complete"})
        self.thread.start()
        stopping = asyncio.ensure_future(receive())
        loading = asyncio.wrap_future(self._loaded)
        either: set[asyncio.Future[Any]] = {stopping, loading}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
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
        first = [{"type": "lifespan.startup"}]

        async def receive() -> Message:
            return first.pop() if first else await stopping

        async def told(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.application = application
                self.ready()
            elif message["type"] == "lifespan.startup.failed":
                raise RuntimeError(f"The server could not start: {message.get('message', '')}")
            else:
                await send(message)

        await application(scope, receive, told)

    def _load(self) -> None:
        try:
            self._loaded.set_result(self.load())
        except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
            self._loaded.set_exception(error)


class Stopping:
    """An ASGI application that lets requests through to `app` until `begun` is set; those that come later hear 503."""

    def __init__(self, app: ASGIApp, shape: Shape) -> None:
        self.app = app
        self.shape: Shape = shape
        self.begun = False
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self.begun:
            message = "The server is being stopped; ask another one, or ask again soon."
            await turn_away(scope, receive, send, self.shape, "stopping", message)
        else:
            await self._counted(scope, receive, send)

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
        try:
            await self.app(scope, receive, sent)
        finally:
            if not answered:
                self.in_flight -= 1
