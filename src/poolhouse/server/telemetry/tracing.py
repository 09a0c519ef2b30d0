"""Traces for OpenTelemetry: a span per request; within it tokenizing, waiting, running and writing.

Texts of users are never in a span. OpenTelemetry's SDK is imported only where traces are sent.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.types import Scope

from poolhouse.engine.request import Answer, Timing
from poolhouse.errors import ConfigError
from poolhouse.server.security import is_probe
from poolhouse.server.telemetry.metrics import route_of
from poolhouse.server.telemetry.observer import Observation
from poolhouse.settings import ServerSettings
from poolhouse.version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

_PATH = "/v1/traces"
# When the server stops.
_SECONDS_TO_SEND = 5
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# What routes leave in the state of a request, by OpenTelemetry's names where it has some.
_ATTRIBUTES = {
    "model": "gen_ai.response.model",
    "tokens": "gen_ai.usage.input_tokens",
    "items": "poolhouse.items",
    "truncated": "poolhouse.truncated",
    "request_id": "poolhouse.request_id",
    "error_kind": "error.type",
}


def open_traces(settings: ServerSettings) -> Traces | None:
    """Traces to the endpoint of the settings; None where they name none.

    Raises:
        ConfigError: see `check`.
    """
    check(settings)
    endpoint = settings.otlp_traces_endpoint
    return None if endpoint is None else Traces(exporter(endpoint))


def check(settings: ServerSettings) -> None:
    """Raise ConfigError for traces that cannot be sent: no packages, or no HTTP address."""
    endpoint = settings.otlp_traces_endpoint
    if endpoint is None:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.resources
        import opentelemetry.sdk.trace.export  # noqa: F401 - only whether what is needed is there
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs OpenTelemetry ({error}): pip install 'poolhouse[tracing]'."
        ) from None
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise ConfigError(
            f"--otlp-traces-endpoint takes OTLP over HTTP, such as http://localhost:4318/v1/traces; got {endpoint}."
        )


def exporter(endpoint: str) -> SpanExporter:
    """Sends spans by OTLP over HTTP; an address without a path gets the usual one."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    bare = urlsplit(endpoint).path in ("", "/")
    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + _PATH if bare else endpoint)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the engine: when it began and ended (by `time.perf_counter`), and the timing of its last answer."""

    submitted: float
    answered: float
    timing: Timing


def note(steps: list[Step], submitted: float, answers: Sequence[Answer]) -> None:
    """Keep where the time of these answers went, among the steps of a traced request."""
    if answers:
        # The last one is what the request waited for.
        last = max((answer.timing for answer in answers), key=_seconds)
        steps.append(Step(submitted, time.perf_counter(), last))


def _seconds(timing: Timing) -> float:
    return timing.tokenize_seconds + timing.queue_seconds + timing.run_seconds


class Traces:
    """Turns requests into spans and sends them in the background: a `Listener`, before the log, which shows `trace_id`.

    OpenTelemetry's own environment variables steer the rest.
    """

    def __init__(self, to: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "poolhouse"}
        self._provider = TracerProvider(
            resource=Resource.create({**service, "service.version": __version__}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(to))
        self._tracer = self._provider.get_tracer("poolhouse", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def started(self, scope: Scope) -> None:
        """Let the calls of the engine be noted."""
        scope["state"]["steps"] = []

    def ended(self, scope: Scope, seen: Observation) -> None:
        """Write the spans of a request."""
        # Probes and scrapes, which come every few seconds, would drown the rest.
        if not is_probe(scope) and route_of(scope) != "/metrics":
            self._write(scope, seen)

    def close(self) -> None:
        """Send what is left; a receiver that does not answer is not waited for."""
        sending = threading.Thread(target=self._provider.shutdown, name="poolhouse-traces", daemon=True)
        sending.start()
        sending.join(_SECONDS_TO_SEND)

    def _write(self, scope: Scope, seen: Observation) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        route, state = route_of(scope), scope["state"]
        method = scope["method"] if scope["method"] in _METHODS else "HTTP"
        attributes = {
            "http.request.method": method,
            "http.response.status_code": seen.status,
            **{attribute: state[name] for name, attribute in _ATTRIBUTES.items() if state.get(name) is not None},
        }
        if route != "unknown":
            attributes["http.route"] = route
        at = _nanoseconds()
        span = self._tracer.start_span(
            f"{method} {route}" if route != "unknown" else method,
            self._parent(scope),
            SpanKind.SERVER,
            attributes,
            start_time=at(seen.started),
        )
        state["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        if span.is_recording():
            if seen.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            within = set_span_in_context(span)
            for name, begin, end in _parts(state["steps"], seen.replied):
                self._tracer.start_span(name, within, start_time=at(begin)).end(at(end))
        span.end(at(seen.ended))

    def _parent(self, scope: Scope) -> Context | None:
        """The caller's span, where the request names one."""
        carrier = {
            name.decode(): value.decode("ascii", "replace")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        return self._propagator.extract(carrier) if "traceparent" in carrier else None


def _parts(steps: Sequence[Step], replied: float | None) -> list[tuple[str, float, float]]:
    """What a request did, as (name, begin, end)."""
    parts: list[tuple[str, float, float]] = []
    for step in steps:
        begin, timing = step.submitted, step.timing
        for name, seconds in (
            ("tokenize", timing.tokenize_seconds),
            ("queue", timing.queue_seconds),
            ("run", timing.run_seconds),
        ):
            parts.append((name, begin, begin + seconds))
            begin += seconds
    if steps and replied is not None:
        parts.append(("serialize", steps[-1].answered, replied))
    return parts


def _nanoseconds() -> Callable[[float], int]:
    """Turns moments of `time.perf_counter` into nanoseconds since 1970."""
    offset = time.time_ns() - int(time.perf_counter() * 1e9)
    return lambda moment: offset + int(moment * 1e9)
