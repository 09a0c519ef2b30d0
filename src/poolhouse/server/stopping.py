"""Turns requests away once the server is being stopped, and knows what is still in flight."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.server.errors import Shape
from poolhouse.server.probes import turn_away


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
