"""The log: lines for people or JSON objects, and a line per request with its id. Texts of users are never in it."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.settings import ServerSettings

access = logging.getLogger("poolhouse.access")

_WORK = ("model", "items", "tokens", "truncated", "error_kind", "trace_id")
_LONGEST_ID = 128
_LONGEST_PATH = 200


def logged(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """The app; every request gets an id, and a line in the log unless that is off."""
    return RequestLog(app, not settings.disable_access_log, settings.disable_access_log_for_endpoints)


def logging_config(settings: ServerSettings) -> dict[str, Any]:
    """What `logging.config.dictConfig` needs: our log and those of libraries on standard error, in the settings' format."""
    formatter = {"()": JsonLines} if settings.log_format == "json" else {"()": TextLines}
    # uvicorn has a level below debug, which Python has not.
    level = 5 if settings.log_level == "trace" else settings.log_level.upper()
    logger = {"handlers": ["stderr"], "level": level, "propagate": False}
    # The command line makes JSON of what others write there; ours is some already.
    stream = getattr(sys.stderr, "beneath", "ext://sys.stderr")
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines", "stream": stream}},
        "filters": {"not_yet": {"()": NotYet}},
        # OpenTelemetry says there what it could not send.
        "loggers": {
            **dict.fromkeys(("poolhouse", "uvicorn", "opentelemetry"), logger),
            "uvicorn.error": {"filters": ["not_yet"]},
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
    }


def say(words: str) -> None:
    """A line on standard output, for people and scripts that wait for it; nobody need read it."""
    try:
        print(words, flush=True)  # noqa: T201 - what this is for
    except (OSError, ValueError):
        give_up_unread()


def give_up_unread() -> None:
    """Let go of what cannot be written to the standard streams: the reader has gone, or the disk is full.

    Python would try again when the process ends, and make that its exit status.
    """
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, descriptor)
                os.close(nothing)


class NotYet(logging.Filter):
    """Drops what uvicorn says of its start: it has started before models are loaded."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.msg not in ("Waiting for application startup.", "Application startup complete.")


class RequestLog:
    """Says in the log what each request was and how it went.

    The id comes from `X-Request-Id`, where that is 1 to 128 visible characters, or is made; the reply shows it, and
    routes find it in `scope["state"]` as `request_id`, and as `given_id` where the client gave it. What they leave there of
    their work (`model`, `items`, `tokens`, `truncated`, `error_kind`, `trace_id`) is logged.
    """

    def __init__(self, app: ASGIApp, enabled: bool = True, quiet: Sequence[str] = ()) -> None:
        self.app = app
        self.enabled = enabled
        self.quiet = frozenset(quiet)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        given = _given_id(scope)
        request_id = given or secrets.token_hex(16)
        scope.setdefault("state", {}).update(given_id=given, request_id=request_id)
        header = (b"x-request-id", request_id.encode("ascii"))
        status = 500

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            if self.enabled and access.isEnabledFor(logging.INFO):
                self._log(scope, status, time.perf_counter() - started)
            # The connection keeps its last request, for as long as it stays open.
            scope["state"].pop("answers", None)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or _safe_path(scope)
        if route in self.quiet:
            return
        state, client = scope["state"], scope.get("client")
        fields = {
            "request_id": state["request_id"],
            "client": f"{client[0]}:{client[1]}" if client else None,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            **{name: state[name] for name in _WORK if state.get(name) is not None},
        }
        # Not through `info`, which walks the stack for the line of code that logs.
        access.handle(
            access.makeRecord(access.name, logging.INFO, "", 0, "request", (), None, extra={"fields": fields})
        )


class TextLines(logging.Formatter):
    """`2025-01-31 12:00:00 info message`; the fields of a request behind it as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        line = super().format(record)
        return line + "".join(f" {name}={_word(value)}" for name, value in fields.items())


class JsonLines(logging.Formatter):
    """A JSON object per line: `time` (UTC), `level`, `logger`, `message`, the fields of a request, `error` with its trace."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _word(value: Any) -> str:
    """A value on a line of text: what has blanks or quotes is quoted, so that nobody can write a line of his own."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and not set(text) & {" ", '"', "="} else repr(text)


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            visible = 0 < len(value) <= _LONGEST_ID and all(0x21 <= byte <= 0x7E for byte in value)
            return value.decode("ascii") if visible else None
    return None


def _safe_path(scope: Scope) -> str:
    """The path of a request that no route took, as it was sent; its query may hold anything and is left out."""
    raw = scope.get("raw_path") or scope["path"].encode()
    return bytes(raw[:_LONGEST_PATH]).decode("ascii", "backslashreplace")
