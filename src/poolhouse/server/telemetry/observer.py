"""Observer: wraps `send` once per request, and gives log, metrics and traces what it sees."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LONGEST_ID = 128


@dataclass(slots=True)
class Observation:
    """What is seen of one request. Moments are by `time.perf_counter`; `replied` is when its reply began."""

    started: float = field(default_factory=time.perf_counter)
    replied: float | None = None
    ended: float = 0.0
    status: int = 500

    @property
    def seconds(self) -> float:
        return self.ended - self.started


class Listener(Protocol):
    """Is called at the start and at the end of every request; must be quick.

    At the end `scope["state"]` holds what routes left there of their work: `model`, `items`, `tokens`, `truncated`,
    `error_kind`.
    """

    def started(self, scope: Scope) -> None: ...

    def ended(self, scope: Scope, seen: Observation) -> None: ...


class RequestObserver:
    """An application whose requests get an id and are observed. The listeners are called in their order.

    The id comes from `X-Request-Id` where that is 1 to 128 visible characters; else it is random. The reply shows it.
    Routes find it in `scope["state"]` as `request_id`, and as `given_id` where the client chose it.
    """

    def __init__(self, app: ASGIApp, listeners: Sequence[Listener] = ()) -> None:
        self.app = app
        self.listeners = listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = Observation()
        given = _given_id(scope)
        request_id = given or secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state["given_id"], state["request_id"] = given, request_id
        header = (b"x-request-id", request_id.encode("ascii"))

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status, seen.replied = message["status"], time.perf_counter()
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        for listener in self.listeners:
            listener.started(scope)
        try:
            await self.app(scope, receive, observed)
        finally:
            seen.ended = time.perf_counter()
            for listener in self.listeners:
                listener.ended(scope, seen)


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            visible = 0 < len(value) <= _LONGEST_ID and all(0x21 <= byte <= 0x7E for byte in value)
            return value.decode("ascii") if visible else None
    return None
