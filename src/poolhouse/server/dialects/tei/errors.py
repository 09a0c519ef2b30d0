"""TEI's errors: its words and status for what went wrong, natively and on its route of OpenAI's."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Response

from poolhouse.errors import EngineClosed, EngineError, InvalidRequest, UnsupportedTask
from poolhouse.server.wire.errors import Failure, Refused, WrongContentType, as_json


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


def _kind(failure: Failure) -> tuple[int, str]:
    """TEI's status and word for it."""
    match failure.error:
        case EmptyInput():
            return 400, "Empty"
        case WrongContentType():
            return 415, "Validation"
        case Refused() if failure.status == 429:
            return 429, "Overloaded"
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
