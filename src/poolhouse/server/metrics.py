"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from poolhouse.engine.request import Answer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one app, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("poolhouse_requests", "Requests answered.", ("route", "status"), registry=registry)
        self.seconds = Histogram(
            "poolhouse_request_seconds",
            "From the first byte read to the reply.",
            ("route",),
            registry=registry,
            buckets=_SECONDS,
        )
        self.in_flight = Gauge("poolhouse_requests_in_flight", "Requests being answered.", registry=registry)
        self.prompts = Counter("poolhouse_prompts", "Prompts answered.", ("model", "task"), registry=registry)
        self.tokens = Counter("poolhouse_prompt_tokens", "Tokens of answered prompts.", ("model",), registry=registry)
        self.truncated = Counter("poolhouse_truncated_prompts", "Prompts that were cut.", ("model",), registry=registry)
        self.parse_seconds = Histogram(
            "poolhouse_parse_seconds", "Reading a body into prompts.", registry=registry, buckets=_SECONDS
        )
        self.render_seconds = Histogram(
            "poolhouse_render_seconds", "Writing answers as bytes.", registry=registry, buckets=_SECONDS
        )

    def count(self, model: str, task: str, answers: Sequence[Answer], tokens: int) -> None:
        """Count what one request was answered."""
        self.prompts.labels(model, task).inc(len(answers))
        self.tokens.labels(model).inc(tokens)
        cut = sum(answer.tokens.truncated for answer in answers)
        if cut:
            self.truncated.labels(model).inc(cut)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
