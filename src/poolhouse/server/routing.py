"""Routing: dialects as rows of routes, the route of each request, and the refusal where there is none."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.errors import did_you_mean
from poolhouse.server.call import Call, JsonObject
from poolhouse.server.engines import Engines
from poolhouse.server.security import is_below, path_of, without
from poolhouse.server.wire.body import read_json
from poolhouse.server.wire.contract import Errors
from poolhouse.server.wire.errors import NoRoute, Shape
from poolhouse.server.wire.probes import SPELLINGS
from poolhouse.settings import ServerSettings

_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")


@dataclass(frozen=True, slots=True)
class Route:
    """One row of a dialect: a method and a path, the function that answers, and what the OpenAPI document describes.

    path: `{model:path}` in it stands for the name of a model, slashes included; see `Call.path_params`.
    answer: gets the call, and the body where there is one. The document shows its name and its docstring.
    body: the pydantic model of the body, which `answer` gets. A tuple: `answer` gets the JSON object, and calls
    `Call.parse` with one of them; for bodies whose fields tell which it is, or that are changed or checked before. None:
    the route reads no body.
    replies: the types of the JSON of a 200; none is an empty body. media: other content types of a 200.
    headers: of a 200, with descriptions. query: parameters of the URL, with descriptions.
    errors: of this route; by default those of its dialect, and none where there is no body to refuse.
    others: further paths of the same route, which the document leaves out. hidden: the document leaves out `path` too.
    read: makes the object of a body, which may be of another kind than JSON.
    form: a multipart form, which `answer` reads itself; for the document.
    """

    method: str
    path: str
    answer: Callable[..., Awaitable[Response]]
    body: type[BaseModel] | tuple[type[BaseModel], ...] | None = None
    replies: tuple[Any, ...] = ()
    errors: tuple[Errors, ...] | None = None
    media: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    hidden: bool = False
    read: Callable[[Request, ServerSettings], Awaitable[JsonObject]] = read_json
    form: type[BaseModel] | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """The routes of one API.

    tag: their group in the OpenAPI document. shape: how errors look; None is the one that --error-format chooses.
    errors: the types of these errors, for the document. prefix: before the path of every route.
    owns: paths of this dialect alone: where no route takes a request there or beneath, the refusal has its shape.
    """

    tag: str
    routes: tuple[Route, ...]
    shape: Shape | None = None
    errors: tuple[Errors, ...] = (Errors(),)
    prefix: str = ""
    owns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route of a dialect at one of its paths; the log and the metrics name it by `path`."""

    path: str
    route: Route
    dialect: Dialect
    documented: bool

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters in the path."""
        return _PARAMETER.findall(self.path)

    @property
    def openapi_path(self) -> str:
        """The path as OpenAPI writes it."""
        return _PARAMETER.sub(r"{\1}", self.path)

    @property
    def pattern(self) -> re.Pattern[str]:
        """What matches the whole path; any text stands for a parameter."""
        parts = _PARAMETER.split(self.path)
        texts = [f"(?P<{part}>.*)" if index % 2 else re.escape(part) for index, part in enumerate(parts)]
        return re.compile("".join(texts))


def endpoints(dialects: Iterable[Dialect]) -> list[Endpoint]:
    """Every route at each of its paths."""
    return [
        Endpoint(dialect.prefix + path, route, dialect, documented=not route.hidden and index == 0)
        for dialect in dialects
        for route in dialect.routes
        for index, path in enumerate((route.path, *route.others))
    ]


Fail = Callable[[Request, Exception], Awaitable[Response]]


class Dispatch:
    """Answers a request by the route of its path; what is no HTTP request goes to the app beneath.

    fail: the response to an exception of a route.
    """

    def __init__(self, app: ASGIApp, dialects: Sequence[Dialect], engines: Engines, fail: Fail) -> None:
        self.app = app
        self.engines = engines
        self.fail = fail
        self.shapes = {path: dialect.shape for dialect in dialects if dialect.shape for path in dialect.owns}
        self.endpoints = endpoints(dialects)
        self.exact: dict[str, dict[str, Endpoint]] = {}
        # Those whose path holds the name of a model; they are few.
        self.patterns = [(one.pattern, one) for one in self.endpoints if one.parameters]
        for one in self.endpoints:
            if not one.parameters:
                self.exact.setdefault(one.path, {}).setdefault(one.route.method, one)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        http = Request(scope, receive, send)
        try:
            response = await self._answer(http)
        except Exception as error:  # noqa: BLE001 - every failure has an answer
            response = await self.fail(http, error)
        await response(scope, receive, send)

    async def _answer(self, http: Request) -> Response:
        scope = http.scope
        path = path_of(scope)
        endpoint = self.exact.get(path, {}).get(scope["method"]) or self._by_pattern(path, scope)
        if endpoint is None:
            return self._unrouted(http, path)
        scope["route"] = endpoint
        route, shape = endpoint.route, endpoint.dialect.shape
        call = Call(self.engines, http)
        if shape is not None:
            call.speak(shape)
        try:
            if route.body is None:
                return await route.answer(call)
            body = await route.read(http, self.engines.settings)
            fields = body if isinstance(route.body, tuple) else call.parse(body, route.body)
            call.started = time.perf_counter()
            return await route.answer(call, fields)
        finally:
            call.release()

    def _by_pattern(self, path: str, scope: Scope) -> Endpoint | None:
        for pattern, endpoint in self.patterns:
            if endpoint.route.method == scope["method"] and (match := pattern.fullmatch(path)):
                scope["path_params"] = match.groupdict()
                return endpoint
        return None

    def _unrouted(self, http: Request, path: str) -> Response:
        """A redirect to the path with or without a slash at its end, else the error that names the routes nearby."""
        whole: str = http.scope["path"]
        other = {**http.scope, "path": whole.rstrip("/") if whole.endswith("/") else f"{whole}/"}
        if path != "/" and not self._at(path) and self._at(path_of(other)):
            return RedirectResponse(URL(scope=other))
        for start, shape in self.shapes.items():
            if path == start or path.startswith(f"{start.rstrip('/')}/"):
                http.state.error_shape = shape
        raise self._refusal(http, path)

    def _at(self, path: str) -> dict[str, Endpoint]:
        """The endpoints of a path, by method."""
        found = {one.route.method: one for pattern, one in self.patterns if pattern.fullmatch(path)}
        return {**found, **self.exact.get(path, {})}

    def _refusal(self, http: Request, path: str) -> NoRoute:
        taken, shown = self._at(path), path[:_MAX_PATH]
        if not taken:
            near = [one.openapi_path for one in self.endpoints if one.route.method == http.method]
            return NoRoute(f"Not Found: there is no route {shown}.{did_you_mean(shown, near)}")
        http.scope["route"] = next(iter(taken.values()))
        message = f"Method Not Allowed: {shown} takes {', '.join(sorted(taken))}, not {http.method[:_MAX_METHOD]}."
        # What answers GET answers HEAD.
        return NoRoute(message, sorted({*taken, "HEAD"} if "GET" in taken else taken))


# Characters of a path and of a method in a message.
_MAX_PATH, _MAX_METHOD = 100, 20


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

        as_get = {**scope, "method": "GET"}
        try:
            await self.app(as_get, receive, without_body)
        finally:
            if "route" in as_get:
                # For the log and the metrics, which are outside of this.
                scope["route"] = as_get["route"]


class Addressed:
    """Sets the root path of a request, and the one spelling of a probe's path, for everything beneath.

    The root path is the prefix of an application around this one, of the server, or `root_path`, which a proxy may strip
    or not.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, root = scope["path"], self._root(scope)
            spelling = SPELLINGS.get(without(root, path).rstrip("/"))
            if spelling is not None:
                path = root + spelling if is_below(root, path) else spelling
            if path != scope["path"] or root != scope.get("root_path", ""):
                scope = {**scope, "path": path, "root_path": root}
        await self.app(scope, receive, send)

    def _root(self, scope: Scope) -> str:
        outer: str = scope.get("root_path", "").rstrip("/")
        # A proxy may strip its part, and leave that of the application around this one.
        mounted = outer.removeprefix(scope.get("app_root_path", "").rstrip("/"))
        candidates = [root for root in (outer, mounted, self.root_path) if root]
        return next((root for root in candidates if is_below(root, scope["path"])), (*candidates, "")[0])
