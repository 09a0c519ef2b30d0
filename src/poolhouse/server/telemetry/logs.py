"""Log: lines for people or JSON objects, and a line per request with its id; never the texts of users."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

import orjson
from starlette.types import Scope

from poolhouse.server.telemetry.observer import Observation
from poolhouse.settings import ServerSettings

access = logging.getLogger("poolhouse.access")

# What routes leave in the state of a request, and traces.
_WORK = ("model", "items", "tokens", "truncated", "error_kind", "trace_id")
_LONGEST_PATH = 200


def logging_config(settings: ServerSettings) -> dict[str, object]:
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


def say(line: str) -> None:
    """A line on standard output, for people and scripts that wait for it; nobody need read it."""
    try:
        print(line, flush=True)  # noqa: T201 - what this is for
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
    """Writes a line for each request that has ended: a `Listener`.

    Its fields are the id, the client, method, route, status and seconds, and what routes left in the state of their work.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.enabled = not settings.disable_access_log
        self.quiet = frozenset(settings.disable_access_log_for_endpoints)

    def started(self, scope: Scope) -> None:
        """Nothing is written yet."""

    def ended(self, scope: Scope, seen: Observation) -> None:
        """Write the line, unless that is off, or off for this route."""
        if not self.enabled or not access.isEnabledFor(logging.INFO):
            return
        route = getattr(scope.get("route"), "path", None) or _safe_path(scope)
        if route in self.quiet:
            return
        state, client = scope["state"], scope.get("client")
        fields = {
            "request_id": state["request_id"],
            "client": f"{client[0]}:{client[1]}" if client else None,
            "method": scope["method"],
            "route": route,
            "status": seen.status,
            "seconds": round(seen.seconds, 6),
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
        return line + "".join(f" {name}={_quoted(value)}" for name, value in fields.items())


class JsonLines(logging.Formatter):
    """A JSON object per line: `time` (UTC), `level`, `logger`, `message`, the fields of a request, `error` with its trace."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return fields


def _quoted(value: object) -> str:
    """A value on a line of text; one with blanks or quotes is quoted, so that no client can forge a line."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and not set(text) & {" ", '"', "="} else repr(text)


def _safe_path(scope: Scope) -> str:
    """The path of a request that no route took, as it was sent; its query may hold anything and is left out."""
    raw = scope.get("raw_path") or scope["path"].encode()
    return bytes(raw[:_LONGEST_PATH]).decode("ascii", "backslashreplace")
