"""Errors of TEI: its status and type for each, on its own routes and on its OpenAI route."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.errors import EngineClosed, EngineError, InvalidRequest, UnsupportedTask
from poolhouse.server.wire.contract import STATUSES, Errors
from poolhouse.server.wire.errors import Failure, Refused, Unavailable, WrongContentType, as_json

ErrorType = Literal["Empty", "Overloaded", "Validation", "Backend", "Unhealthy"]


class EmptyInput(Refused):
    """TEI's own refusal of no text."""

    def __init__(self, name: str) -> None:
        super().__init__(f"`{name}` cannot be empty", 400, name)


def shape(failure: Failure) -> Response:
    """TEI's error body."""
    status, kind = _kind(failure)
    return as_json(replace(failure, status=status), {"error": failure.message, "error_type": kind})


def openai_shape(failure: Failure) -> Response:
    """The error body of TEI's route of OpenAI's."""
    status, kind = _kind(failure)
    return as_json(replace(failure, status=status), {"message": failure.message, "code": status, "type": kind})


def _kind(failure: Failure) -> tuple[int, ErrorType]:
    """TEI's status and type of an error."""
    match failure.error:
        case EmptyInput():
            return 400, "Empty"
        case WrongContentType():
            return 415, "Validation"
        case Refused() if failure.status == 429:
            return 429, "Overloaded"
        case Unavailable():
            return 503, "Unhealthy"
        case Refused():
            return failure.status, "Validation"
        case UnsupportedTask():
            return 424, "Backend"
        case InvalidRequest():
            return 404 if failure.status == 404 else 422, "Validation"
        case EngineClosed():
            return 503, "Unhealthy"
        case EngineError():
            return 424, "Backend"
    return (422, "Validation") if failure.status == 400 else (failure.status, "Backend")


class Error(TypedDict):
    """An error in TEI's shape."""

    error: str
    error_type: ErrorType


class OpenAIError(TypedDict):
    """An error of TEI's OpenAI route."""

    message: str
    code: int
    type: ErrorType


_STATUSES = (*STATUSES, 424)
ERRORS = Errors(Error, _STATUSES)
OPENAI_ERRORS = Errors(OpenAIError, _STATUSES)
