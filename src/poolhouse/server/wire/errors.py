"""Errors on the wire: status, message and type of each exception, decided once, and the shapes of bodies."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus

import orjson
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.errors import (
    EngineClosed,
    EngineError,
    FetchFailed,
    InvalidRequest,
    UnknownModel,
    UnsupportedDimensions,
    UnsupportedTask,
)

log = logging.getLogger("poolhouse")

# Problems of one body in a message.
_MAX_PROBLEMS = 10


class Refused(Exception):
    """A request that is refused before the engine gets it: too large, not JSON, one too many."""

    def __init__(self, message: str, status: int = 400, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.parameter = parameter


class WrongContentType(Refused):
    """A body whose content type is not JSON."""


class Unread(Refused):
    """A body in an encoding that the server cannot read. codings: the content codings that it can, where that is the reason."""

    def __init__(self, message: str, codings: Iterable[str] = ()) -> None:
        self.codings = ", ".join(codings)
        advice = f" Send one of {self.codings}, or none (Content-Encoding)." if self.codings else ""
        super().__init__(message + advice, 415)


class Overloaded(Refused):
    """The queue is full; after `retry_after` seconds there should be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, 429)
        self.retry_after = retry_after


class Unavailable(Refused):
    """A model that cannot be used now; after `retry_after` seconds it may be."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, 503)
        self.retry_after = retry_after


class NoRoute(Refused):
    """No route takes the path, or its method; `allowed` are the methods that the path takes."""

    def __init__(self, message: str, allowed: Sequence[str] = ()) -> None:
        super().__init__(message, 405 if allowed else 404)
        self.allowed = allowed


class Disconnected(Exception):
    """The client closed the connection and waits no longer."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as replies show it.

    kind: vLLM's type of the error; dialects that have types of their own choose them by `error` and status.
    error: the exception; None where it was unexpected.
    """

    status: int
    message: str
    kind: str
    parameter: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    error: Exception | None = None


Shape = Callable[[Failure], Response]


def flat(failure: Failure) -> Response:
    """The error body of older vLLM."""
    return as_json(failure, {"object": "error", **_fields(failure)})


def nested(failure: Failure) -> Response:
    """The error body of OpenAI and of newer vLLM."""
    return as_json(failure, {"error": _fields(failure)})


def both(failure: Failure) -> Response:
    """The fields of both: clients of older vLLM read the first, OpenAI's client for npm only the second."""
    fields = _fields(failure)
    return as_json(failure, {"object": "error", **fields, "error": fields})


SHAPES: Mapping[str, Shape] = {"both": both, "flat": flat, "nested": nested}


def as_json(failure: Failure, body: object) -> Response:
    """A reply with the failure's status and headers."""
    return Response(orjson.dumps(body), failure.status, dict(failure.headers), "application/json")


class Answering:
    """The response to an exception of a route, in the shape of its dialect, else in the `default` one.

    The response to an unexpected exception shows nothing of it. tasks: those of each model, added to the message about a
    task that a model lacks; empty where there is one model.
    """

    def __init__(self, default: Shape, tasks: str = "") -> None:
        self.default = default
        self.tasks = tasks

    async def __call__(self, http: Request, error: Exception) -> Response:
        if isinstance(error, Disconnected):
            return Response(status_code=499)
        failure = failure_of(error)
        if isinstance(error, UnsupportedTask) and error.parameter in (None, "model", "task") and self.tasks:
            failure = replace(failure, message=f"{failure.message.removesuffix('.')}. {self.tasks}")
        if failure.error is None:
            log.error("%s %s failed", http.method, http.url.path, exc_info=error)
        http.state.error_kind = failure.kind
        shape: Shape = getattr(http.state, "error_shape", self.default)
        return shape(failure)


def failure_of(error: Exception) -> Failure:
    """The error that the caller gets for an exception of a route."""
    match error:
        case Overloaded():
            seconds = str(max(1, math.ceil(error.retry_after)))
            return Failure(429, str(error), "Too Many Requests", None, {"Retry-After": seconds}, error)
        case Unavailable():
            seconds = str(max(1, math.ceil(error.retry_after)))
            return Failure(503, str(error), "ServiceUnavailableError", "model", {"Retry-After": seconds}, error)
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
        case FetchFailed():
            return Failure(422, str(error), "UnprocessableEntityError", error.parameter, {}, error)
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


class WrongField(TypedDict):
    """A field of a body that is wrong, as FastAPI describes it; `loc` begins with "body"."""

    type: str
    loc: list[str | int]
    msg: str


def problems(error: ValidationError) -> list[WrongField]:
    """The first problems of a body."""
    return [
        {"type": problem["type"], "loc": ["body", *problem["loc"]], "msg": problem["msg"]}
        for problem in error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_PROBLEMS]
    ]


def _schema(error: ValidationError) -> Failure:
    listed = problems(error)
    paths = [".".join(map(str, problem["loc"][1:])) for problem in listed]
    lines = [": ".join(filter(None, (path, problem["msg"]))) for path, problem in zip(paths, listed, strict=True)]
    first = paths[0]
    message = f"{error.error_count()} validation error(s): " + "; ".join(lines)
    return Failure(400, message, "Bad Request", f"body.{first}" if first else "body", {}, error)


def _fields(failure: Failure) -> dict[str, object]:
    return {
        "message": failure.message,
        "type": failure.kind,
        "param": failure.parameter,
        "code": failure.status,
    }
