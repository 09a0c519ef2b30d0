"""Spans for OpenTelemetry: one per request, and within it tokenising, waiting, running and writing.

Texts of users are never in a span.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

import poolhouse
from poolhouse.server.telemetry.metrics import route_of
from poolhouse.server.telemetry.tracing import Seen

_PATH = "/v1/traces"
# At a stop.
_SECONDS_TO_SEND = 5
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def exporter(endpoint: str) -> SpanExporter:
    """Sends spans by OTLP over HTTP; an address without a path gets the usual one."""
    bare = urlsplit(endpoint).path in ("", "/")
    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + _PATH if bare else endpoint)


class Traces:
    """Makes spans and sends them in the background. OpenTelemetry's own environment variables steer the rest."""

    def __init__(self, to: SpanExporter) -> None:
        service = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "poolhouse"}
        self._provider = TracerProvider(
            resource=Resource.create({**service, "service.version": poolhouse.__version__}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(to))
        self._tracer = self._provider.get_tracer("poolhouse", poolhouse.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def write(self, scope: Scope, seen: Seen, ended: float) -> None:
        """The spans of one request that has ended."""
        route, state = route_of(scope), scope["state"]
        method = scope["method"] if scope["method"] in _METHODS else "HTTP"
        attributes = {"http.request.method": method, "http.response.status_code": seen.status, **_work(state)}
        if route != "unknown":
            attributes["http.route"] = route
        span = self._tracer.start_span(
            f"{method} {route}" if route != "unknown" else method,
            self._parent(scope),
            SpanKind.SERVER,
            attributes,
            start_time=seen.at(seen.started),
        )
        state["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        if span.is_recording():
            if seen.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            self._write_steps(seen, set_span_in_context(span))
        span.end(seen.at(ended))

    def close(self) -> None:
        """Send what is left; a receiver that does not answer is not waited for."""
        sending = threading.Thread(target=self._provider.shutdown, name="poolhouse-traces", daemon=True)
        sending.start()
        sending.join(_SECONDS_TO_SEND)

    def _write_steps(self, seen: Seen, within: Context) -> None:
        for step in seen.steps:
            begin, timing = step.submitted, step.timing
            for name, seconds in (
                ("tokenize", timing.tokenize_seconds),
                ("queue", timing.queue_seconds),
                ("run", timing.run_seconds),
            ):
                self._write_step(seen, within, name, begin, begin + seconds)
                begin += seconds
        if seen.steps and seen.replied is not None:
            self._write_step(seen, within, "serialize", seen.steps[-1].answered, seen.replied)

    def _write_step(self, seen: Seen, within: Context, name: str, begin: float, end: float) -> None:
        self._tracer.start_span(name, within, start_time=seen.at(begin)).end(seen.at(end))

    def _parent(self, scope: Scope) -> Context | None:
        """The caller's span, where the request names one."""
        carrier = {
            name.decode(): value.decode("ascii", "replace")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        return self._propagator.extract(carrier) if "traceparent" in carrier else None


def _work(state: Mapping[str, Any]) -> dict[str, Any]:
    """What routes say of their work, in OpenTelemetry's words where it has some."""
    return {attribute: state[name] for name, attribute in _ATTRIBUTES.items() if state.get(name) is not None}


_ATTRIBUTES = {
    "model": "gen_ai.response.model",
    "tokens": "gen_ai.usage.input_tokens",
    "items": "poolhouse.items",
    "truncated": "poolhouse.truncated",
    "request_id": "poolhouse.request_id",
    "error_kind": "error.type",
}
