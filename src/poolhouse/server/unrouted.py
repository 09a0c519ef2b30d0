"""Requests that no route takes, answered in the words of the dialect whose path they have, else in ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from poolhouse.errors import did_you_mean
from poolhouse.server.errors import Answering, NoRoute, Shape, speak
from poolhouse.server.security import path_of

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
