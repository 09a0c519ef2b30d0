"""Errors as the wire shows them."""

from __future__ import annotations

import logging
from typing import Literal

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError

from poolhouse.errors import (
    EngineClosed,
    EngineError,
    InvalidRequest,
    UnknownModel,
    UnsupportedDimensions,
)

log = logging.getLogger("poolhouse")

Format = Literal["flat", "nested"]

# At most this many problems of a body are listed.
_MOST_PROBLEMS = 10


class BadBody(Exception):
    """A body that is no request at all: too large, not JSON, of another content type."""

    def __init__(self, message: str, status: int = 400, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.parameter = parameter


def install(app: FastAPI, shape: Format) -> None:
    """Answer every error that a route raises in the chosen shape; an unexpected one tells nothing of the inside."""

    async def bad_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, BadBody)
        kind = "Request Entity Too Large" if error.status == 413 else "Bad Request"
        return reply(shape, str(error), kind, error.parameter, error.status)

    async def schema(_: Request, error: Exception) -> Response:
        assert isinstance(error, ValidationError)
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [
            ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))
            for problem in problems[:_MOST_PROBLEMS]
        ]
        first = ".".join(map(str, problems[0]["loc"]))
        message = f"{len(problems)} validation error(s): " + "; ".join(lines)
        return reply(shape, message, "Bad Request", f"body.{first}" if first else "body", 400)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, InvalidRequest)
        if isinstance(error, UnknownModel):
            return reply(shape, str(error), "NotFoundError", error.parameter, 404)
        # vLLM names no parameter for Matryoshka errors.
        parameter = None if isinstance(error, UnsupportedDimensions) else error.parameter
        return reply(shape, str(error), "BadRequestError", parameter, 400)

    async def engine(_: Request, error: Exception) -> Response:
        if isinstance(error, EngineClosed):
            return reply(shape, str(error), "ServiceUnavailableError", None, 503)
        return reply(shape, str(error), "InternalServerError", None, 500)

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        response = reply(
            shape, "The server failed on this request; its log says why.", "InternalServerError", None, 500
        )
        # This reply goes out above all middleware, and it is the one whose id matters most.
        if request_id := request.scope.get("state", {}).get("request_id"):
            response.headers["x-request-id"] = request_id
        return response

    app.add_exception_handler(BadBody, bad_body)
    app.add_exception_handler(ValidationError, schema)
    app.add_exception_handler(InvalidRequest, invalid)
    app.add_exception_handler(EngineError, engine)
    app.add_exception_handler(Exception, unexpected)


def reply(shape: Format, message: str, kind: str, parameter: str | None, status: int) -> Response:
    """An error body: vLLM's flat one of old, or the one nested under "error"."""
    fields = {"message": message, "type": kind, "param": parameter, "code": status}
    body = {"object": "error", **fields} if shape == "flat" else {"error": fields}
    return Response(orjson.dumps(body), status, media_type="application/json")
