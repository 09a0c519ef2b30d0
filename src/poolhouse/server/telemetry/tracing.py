"""Tracing: what is seen of each request, for OpenTelemetry; nothing of that is imported unless traces are asked for."""

from __future__ import annotations

import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.engine.request import Answer, Timing
from poolhouse.errors import ConfigError
from poolhouse.server.security import is_probe
from poolhouse.server.telemetry.metrics import route_of
from poolhouse.settings import ServerSettings

if TYPE_CHECKING:
    from poolhouse.server.telemetry.opentelemetry import Traces


def open_traces(settings: ServerSettings) -> Traces | None:
    """Traces to where the settings say; None where they say nothing.

    Raises:
        ConfigError: see `check`.
    """
    check(settings)
    if settings.otlp_traces_endpoint is None:
        return None
    from poolhouse.server.telemetry import opentelemetry

    return opentelemetry.Traces(opentelemetry.exporter(settings.otlp_traces_endpoint))


def check(settings: ServerSettings) -> None:
    """Raise ConfigError for traces that cannot be sent: no packages, or no HTTP address."""
    endpoint = settings.otlp_traces_endpoint
    if endpoint is None:
        return
    try:
        import poolhouse.server.telemetry.opentelemetry  # noqa: F401 - only whether what it needs is there
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs OpenTelemetry ({error}): pip install 'poolhouse[tracing]'."
        ) from None
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise ConfigError(
            f"--otlp-traces-endpoint takes OTLP over HTTP, such as http://localhost:4318/v1/traces; got {endpoint}."
        )


def note(state: MutableMapping[str, Any], submitted: float, answers: Sequence[Answer]) -> None:
    """Keep where the time of these answers went, if the request of this state is traced."""
    steps: list[Step] | None = state.get("steps")
    if steps is not None and answers:
        # The last one is what the request waited for.
        last = max((answer.timing for answer in answers), key=_seconds)
        steps.append(Step(submitted, time.perf_counter(), last))


def _seconds(timing: Timing) -> float:
    return timing.tokenize_seconds + timing.queue_seconds + timing.run_seconds


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the engine: when it began and ended (by `time.perf_counter`), and the timing of its last answer."""

    submitted: float
    answered: float
    timing: Timing


@dataclass(slots=True)
class Seen:
    """What is seen of a request; moments by `time.perf_counter`. replied: when its reply began."""

    started: float = field(default_factory=time.perf_counter)
    started_nanoseconds: int = field(default_factory=time.time_ns)
    replied: float | None = None
    status: int = 500
    steps: list[Step] = field(default_factory=list)

    def at(self, moment: float) -> int:
        """The moment in nanoseconds since 1970."""
        return self.started_nanoseconds + int((moment - self.started) * 1e9)


class Traced:
    """An app whose requests are traced; `trace_id` is in the state of each, for the log."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self.app = app
        self.traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = Seen()
        scope["state"]["steps"] = seen.steps

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status, seen.replied = message["status"], time.perf_counter()
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            # Probes and scrapes, which come every few seconds, would drown the rest.
            if not is_probe(scope) and route_of(scope) != "/metrics":
                self.traces.write(scope, seen, time.perf_counter())
