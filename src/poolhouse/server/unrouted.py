"""Requests that no route takes, answered in the words of the dialect whose prefix their path has, else in ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from poolhouse.errors import did_you_mean
from poolhouse.server.errors import Answering, NoRoute, Shape, speak
from poolhouse.server.security import path_of

# Of a path and a method, so much is repeated.
_LONGEST_PATH, _LONGEST_METHOD = 100, 20


def install(app: FastAPI, routers: Iterable[APIRouter], answering: Answering, prefixes: Mapping[str, Shape]) -> None:
    """Answer what none of these routers takes. prefixes: how errors look under each."""
    methods: dict[str, set[str]] = {}
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute):
                methods.setdefault(route.path, set()).update(route.methods or ())

    async def answer(http: Request, _: Exception) -> Response:
        path = path_of(http.scope)
        for prefix, shape in prefixes.items():
            if path == prefix or path.startswith(f"{prefix}/"):
                speak(http, shape)
        return await answering(http, _error(path, http.method, methods))

    app.add_exception_handler(HTTPException, answer)


def _error(path: str, method: str, methods: Mapping[str, set[str]]) -> NoRoute:
    allowed = sorted(methods.get(path, ()))
    shown = path[:_LONGEST_PATH]
    if allowed:
        taken = ", ".join(allowed)
        return NoRoute(f"Method Not Allowed: {shown} takes {taken}, not {method[:_LONGEST_METHOD]}.", allowed)
    known = [other for other, taken in methods.items() if method in taken]
    return NoRoute(f"Not Found: there is no route {shown}.{did_you_mean(shown, known)}")
