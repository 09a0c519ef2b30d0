"""Dispatch: routes that read their own body are found by their path, and answered without FastAPI in between.

FastAPI tries its routes one by one, and wraps each in what ours do not need; with the routes of every dialect that takes
longer than all the rest of a request. It still knows them, for OpenAPI.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.errors import did_you_mean
from poolhouse.server.security import is_below, path_of, without
from poolhouse.server.wire.errors import Answering, NoRoute, Shape, speak
from poolhouse.server.wire.probes import probe

Fail = Callable[[Request, Exception], Awaitable[Response]]


class Dispatch:
    """Calls the direct route of a request's path; everything else goes to the app beneath.

    fail: the response to what a route raised.
    """

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter], fail: Fail) -> None:
        self.app = app
        self.fail = fail
        direct = [route for router in routers for route in router.routes if isinstance(route, DirectRoute)]
        self.routes = {(method, route.path): route for route in direct for method in route.methods or ()}
        # Those whose path holds the name of a model; they are few.
        self.patterns = [route for route in direct if route.param_convertors]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        if scope["type"] == "http":
            route = self.routes.get((scope["method"], path_of(scope))) or self._by_pattern(scope)
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        http = Request(scope, receive, send)
        try:
            response: Response = await route.endpoint(http)
        except Exception as error:  # noqa: BLE001 - every failure has an answer
            response = await self.fail(http, error)
        await response(scope, receive, send)

    def _by_pattern(self, scope: Scope) -> DirectRoute | None:
        for route in self.patterns:
            match, found = route.matches(scope)
            if match is Match.FULL:
                scope["path_params"] = found["path_params"]
                return route
        return None


class Heads:
    """Answers HEAD as GET, with the same status and headers and without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        asked = {**scope, "method": "GET"}
        try:
            await self.app(asked, receive, without_body)
        finally:
            if "route" in asked:
                # The log and the metrics, which stand outside, name it.
                scope["route"] = asked["route"]


class Addressed:
    """Tells everything beneath where it stands, and of every probe by one spelling.

    Where it stands is the path prefix of an application around it, of the server, or of `root_path`, which a proxy may
    strip or not.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, root = scope["path"], self._root(scope)
            spelling = probe(without(root, path))
            if spelling is not None:
                path = root + spelling if is_below(root, path) else spelling
            if path != scope["path"] or root != scope.get("root_path", ""):
                scope = {**scope, "path": path, "root_path": root}
        await self.app(scope, receive, send)

    def _root(self, scope: Scope) -> str:
        given: str = scope.get("root_path", "").rstrip("/")
        # A proxy may strip its part, and leave that of the application around us.
        mounted = given.removeprefix(scope.get("app_root_path", "").rstrip("/"))
        candidates = [root for root in (given, mounted, self.root_path) if root]
        return next((root for root in candidates if is_below(root, scope["path"])), (*candidates, "")[0])


class DirectRoute(APIRoute):
    """A route whose function takes the request and gives the response; OpenAPI knows it like any other."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def direct_router(tag: str, prefix: str = "") -> APIRouter:
    """A router of such routes."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=DirectRoute)


# Of a path and a method, so much is repeated.
_LONGEST_PATH, _LONGEST_METHOD = 100, 20


def install(app: FastAPI, routers: Iterable[APIRouter], answering: Answering, shapes: Mapping[str, Shape]) -> None:
    """Answer what none of these routers takes. shapes: how errors look at each of these paths, and beneath it."""
    known: dict[str, _Path] = {}
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute):
                path = known.setdefault(route.path_format, _Path(route.path_regex, set()))
                path.methods.update(route.methods or ())

    async def answer(http: Request, _: Exception) -> Response:
        path = path_of(http.scope)
        for start, shape in shapes.items():
            if path == start or path.startswith(f"{start.rstrip('/')}/"):
                speak(http, shape)
        return await answering(http, _error(path, http.method, known))

    app.add_exception_handler(HTTPException, answer)


@dataclass(frozen=True, slots=True)
class _Path:
    """A path, and the methods that it takes. pattern: of its whole; a name of a model may stand within."""

    pattern: re.Pattern[str]
    methods: set[str]


def _error(path: str, method: str, known: Mapping[str, _Path]) -> NoRoute:
    taken = sorted(set[str]().union(*(one.methods for one in known.values() if one.pattern.match(path))))
    shown = path[:_LONGEST_PATH]
    if taken:
        words = f"Method Not Allowed: {shown} takes {', '.join(taken)}, not {method[:_LONGEST_METHOD]}."
        return NoRoute(words, _with_head(taken))
    near = [name for name, one in known.items() if method in one.methods]
    return NoRoute(f"Not Found: there is no route {shown}.{did_you_mean(shown, near)}")


def _with_head(methods: Sequence[str]) -> list[str]:
    """What answers GET answers HEAD."""
    return sorted({*methods, "HEAD"} if "GET" in methods else methods)
