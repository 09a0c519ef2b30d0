"""Errors as the wire shows them: what went wrong is decided once, each dialect has a shape for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from poolhouse.errors import (
    EngineClosed,
    EngineError,
    InvalidRequest,
    UnknownModel,
    UnsupportedDimensions,
    UnsupportedTask,
)

log = logging.getLogger("poolhouse")

# At most this many problems of a body are listed.
_MOST_PROBLEMS = 10


class Refused(Exception):
    """A request that is turned away before it is one: too large, not JSON, one too many."""

    def __init__(self, message: str, status: int = 400, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.parameter = parameter


class WrongContentType(Refused):
    """A body that is not said to be JSON."""


class Unread(Refused):
    """A body in an encoding that is not read here; `codings` are the content codings that are, where that is why."""

    def __init__(self, message: str, codings: Iterable[str] = ()) -> None:
        self.codings = ", ".join(codings)
        ways = f" Send one of {self.codings}, or none (Content-Encoding)." if self.codings else ""
        super().__init__(message + ways, 415)


class Overloaded(Refused):
    """The queue is full; `retry_after` seconds from now it may not be."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, 429)
        self.retry_after = retry_after


class NoRoute(Refused):
    """No route takes the path, or its method; `allowed` are the methods that the path takes."""

    def __init__(self, message: str, allowed: Sequence[str] = ()) -> None:
        super().__init__(message, 405 if allowed else 404)
        self.allowed = allowed


class Disconnected(Exception):
    """The client hung up; nobody waits for the answer."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong.

    kind: the word that vLLM has for it; dialects with words of their own go by `error` and status.
    error: None where nobody expected it.
    """

    status: int
    message: str
    kind: str
    parameter: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    error: Exception | None = None


Shape = Callable[[Failure], Response]


def flat(failure: Failure) -> Response:
    """vLLM's body of old."""
    return as_json(failure, {"object": "error", **_fields(failure)})


def nested(failure: Failure) -> Response:
    """OpenAI's body, and that of newer vLLM."""
    return as_json(failure, {"error": _fields(failure)})


def both(failure: Failure) -> Response:
    """The fields of one and of the other: clients of vLLM's old servers read the first, OpenAI's for npm only the second."""
    fields = _fields(failure)
    return as_json(failure, {"object": "error", **fields, "error": fields})


SHAPES: Mapping[str, Shape] = {"both": both, "flat": flat, "nested": nested}


def as_json(failure: Failure, body: object) -> Response:
    """A reply with the failure's status and headers."""
    return Response(orjson.dumps(body), failure.status, dict(failure.headers), "application/json")


def speak(http: Request, shape: Shape) -> None:
    """From here on, errors of this request have that shape."""
    http.state.error_shape = shape


class Answering:
    """The response to whatever a route raised, in the shape of its dialect; `default` where it chose none.

    An unexpected error tells nothing of the inside. served: what is said of a task that a model lacks, where other
    models may have it.
    """

    def __init__(self, default: Shape, served: str = "") -> None:
        self.default = default
        self.served = served

    async def __call__(self, http: Request, error: Exception) -> Response:
        if isinstance(error, Disconnected):
            return Response(status_code=499)
        failure = failure_of(error)
        if isinstance(error, UnsupportedTask) and error.parameter in (None, "model", "task") and self.served:
            failure = replace(failure, message=f"{failure.message.removesuffix('.')}. {self.served}")
        if failure.error is None:
            log.error("%s %s failed", http.method, http.url.path, exc_info=error)
        http.state.error_kind = failure.kind
        shape: Shape = getattr(http.state, "error_shape", self.default)
        return shape(failure)


def failure_of(error: Exception) -> Failure:
    """What an exception of a route means to the caller."""
    match error:
        case Overloaded():
            seconds = str(max(1, math.ceil(error.retry_after)))
            return Failure(429, str(error), "Too Many Requests", None, {"Retry-After": seconds}, error)
        case NoRoute():
            headers = {"Allow": ", ".join(error.allowed)} if error.allowed else {}
            return Failure(error.status, str(error), HTTPStatus(error.status).phrase, None, headers, error)
        case Unread():
            # RFC 9110, 15.5.16.
            headers = {"Accept-Encoding": error.codings} if error.codings else {}
            return Failure(415, str(error), HTTPStatus(415).phrase, error.parameter, headers, error)
        case Refused():
            return Failure(
                error.status, str(error), _REFUSALS.get(error.status, "Bad Request"), error.parameter, {}, error
            )
        case ValidationError():
            return _schema(error)
        case UnknownModel():
            return Failure(404, str(error), "NotFoundError", error.parameter, {}, error)
        case UnsupportedDimensions():
            # vLLM names no parameter for Matryoshka errors.
            return Failure(400, str(error), "BadRequestError", None, {}, error)
        case InvalidRequest():
            return Failure(400, str(error), "BadRequestError", error.parameter, {}, error)
        case EngineClosed():
            return Failure(503, str(error), "ServiceUnavailableError", None, {}, error)
        case EngineError():
            return Failure(500, str(error), "InternalServerError", None, {}, error)
    return Failure(500, "The server failed on this request; its log says why.", "InternalServerError")


_REFUSALS = {
    401: "Unauthorized",
    408: "Request Timeout",
    413: "Request Entity Too Large",
    504: "Gateway Timeout",
}


def problems(error: ValidationError) -> list[dict[str, Any]]:
    """The first problems of a body as FastAPI tells them: `type`, `loc`, which begins with "body", and `msg`."""
    return [
        {"type": problem["type"], "loc": ["body", *problem["loc"]], "msg": problem["msg"]}
        for problem in error.errors(include_url=False, include_context=False, include_input=False)[:_MOST_PROBLEMS]
    ]


def _schema(error: ValidationError) -> Failure:
    told = problems(error)
    places = [".".join(map(str, problem["loc"][1:])) for problem in told]
    lines = [": ".join(filter(None, (place, problem["msg"]))) for place, problem in zip(places, told, strict=True)]
    first = places[0]
    message = f"{error.error_count()} validation error(s): " + "; ".join(lines)
    return Failure(400, message, "Bad Request", f"body.{first}" if first else "body", {}, error)


def _fields(failure: Failure) -> dict[str, object]:
    return {
        "message": failure.message,
        "type": failure.kind,
        "param": failure.parameter,
        "code": failure.status,
    }
