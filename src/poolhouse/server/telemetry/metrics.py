"""Metrics for Prometheus: what the server counts, its queues, and the same under vLLM's names."""

from __future__ import annotations

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from starlette.types import Scope

from poolhouse.engine.interface import Replicated
from poolhouse.engine.observing import BatchRun
from poolhouse.server.telemetry.observer import Observation

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Loading a model takes longer.
_LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# Steps within the server and the engine are shorter than requests.
_SHORT = (0.0001, 0.00025, 0.0005, *_SECONDS)
_TOKENS = tuple(2**power for power in range(4, 18))
_SEQUENCES = tuple(2**power for power in range(12))
_FILL = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def route_of(scope: Scope) -> str:
    """The route of a request; unknown paths share one name, for a caller must not be able to grow the metrics."""
    path: str = getattr(scope.get("route"), "path", "unknown")
    return path


@dataclass(frozen=True, slots=True)
class Queue:
    """What one served name has to do, read when Prometheus asks.

    model: the name of the model that answers; for an adapter, the one beneath. waiting: prompts that were accepted and
    have no answer yet. running: sequences of the batches on the device.
    """

    name: str
    model: str
    waiting: Callable[[], int]
    running: Callable[[], int]


class Metrics:
    """The counters of one app, in a registry of their own; a `Listener` of requests.

    in_flight: requests being answered; belongs to the event loop.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.in_flight = 0
        self._requests = self._counter("requests", "Requests answered.", "route", "status", "model")
        self.seconds = self._histogram(
            "request_seconds", "From the headers of a request to the end of its reply.", _SECONDS, "route", "model"
        )
        self._errors = self._counter("errors", "Requests that failed.", "route", "kind")
        self._unanswered = {
            429: self._counter("rejected_requests", "Requests refused because the queue was full (429).", "model"),
            499: self._counter("abandoned_requests", "Requests whose client hung up (499).", "model"),
            504: self._counter("timed_out_requests", "Requests that waited too long (504).", "model"),
        }
        self._gauge("requests_in_flight", "Requests being answered.").set_function(lambda: self.in_flight)
        self.prompts = self._counter("prompts", "Prompts answered, by their first task.", "route", "model", "task")
        self.tokens = self._counter("prompt_tokens", "Tokens of answered prompts.", "model")
        self.shared = self._counter(
            "shared_tokens", "Tokens of prompts that did not run, since others of their batch begin with them.", "model"
        )
        self.pictures = self._counter("pictures", "Pictures that the model read.", "model")
        self._truncated = self._counter("truncated_prompts", "Prompts that were cut.", "model")
        self.parse_seconds = self._histogram("parse_seconds", "Checking the fields of a body.", _SHORT)
        self.serialize_seconds = self._histogram("serialize_seconds", "Writing answers as bytes.", _SHORT)
        self._of_engines = (
            self._histogram("tokenize_seconds", "One tokenizer call.", _SHORT, "model"),
            self._histogram("queue_seconds", "Waiting for a tokenizer thread and for a batch.", _SHORT, "model"),
            self._histogram("forward_seconds", "The backbone of one batch.", _SHORT, "model"),
            self._histogram("pooling_seconds", "The pooling of one batch.", _SHORT, "model"),
            self._histogram("batch_tokens", "Tokens that one batch ran.", _TOKENS, "model"),
            self._histogram("batch_sequences", "Sequences of one batch.", _SEQUENCES, "model"),
            self._histogram(
                "batch_fill",
                "Tokens that one batch ran by its budget; over 1: a long prompt, or many behind a long beginning.",
                _FILL,
                "model",
            ),
        )
        self.loads = self._counter("model_loads", "Loads of models on demand.", "model")
        self.load_failures = self._counter("model_load_failures", "Loads that failed.", "model")
        self.unloads = self._counter("model_unloads", "Models that were closed, and why.", "model", "reason")
        self.load_seconds = self._histogram("model_load_seconds", "Loading one model on demand.", _LONG, "model")
        self._queues: dict[str, Queue] = {}
        self.registry.register(QueuedPrompts(self._queues))
        self.registry.register(VllmNames(self, self._queues))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        # A lookup of a series by its labels costs more than counting in it.
        self._of_requests = cache(self._requests.labels)
        self._of_seconds = cache(self.seconds.labels)
        self._of_prompts = cache(self.prompts.labels)
        self._of_tokens = cache(self.tokens.labels)

    def engine(self, model: str) -> EngineMetrics:
        """The observer of the engine of that name; what it counts is there from now on, as 0."""
        for counter in (self.tokens, self._truncated, *self._unanswered.values()):
            counter.labels(model)
        return EngineMetrics(self._of_engines, self.pictures, self.shared, model)

    def answered(self, route: str, model: str, task: str, prompts: int, tokens: int, truncated: int) -> None:
        """Count what one request was answered."""
        self._of_prompts(route, model, task).inc(prompts)
        self._of_tokens(model).inc(tokens)
        if truncated:
            self._truncated.labels(model).inc(truncated)

    def follow(self, queues: Iterable[Queue]) -> None:
        """Report these queues too, each name once, and what is counted of their models under vLLM's names too."""
        self._queues.update({queue.name: queue for queue in queues})

    def follow_replicas(self, engines: Mapping[str, Replicated]) -> None:
        """Report the replicas of these engines, by the names of their models."""
        if engines:
            self.registry.register(ReplicaStates(engines))

    def started(self, scope: Scope) -> None:
        """Count a request as in flight."""
        self.in_flight += 1

    def ended(self, scope: Scope, seen: Observation) -> None:
        """Count one request; its model and the kind of its error stand in the scope's state, where they are known."""
        self.in_flight -= 1
        state, status = scope["state"], seen.status
        route, model = route_of(scope), state.get("model", "")
        self._of_requests(route, status, model).inc()
        self._of_seconds(route, model).observe(seen.seconds)
        if status >= 400:
            self._errors.labels(route, state.get("error_kind") or _phrase(status)).inc()
            if status in self._unanswered:
                self._unanswered[status].labels(model).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"poolhouse_{name}", what, labels, registry=self.registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"poolhouse_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"poolhouse_{name}", what, labels, registry=self.registry, buckets=buckets)


class EngineMetrics:
    """Counts the work of an engine: an `Observer` of it."""

    def __init__(self, histograms: Sequence[Histogram], pictures: Counter, shared: Counter, model: str) -> None:
        self.pictures, self.shared = pictures.labels(model), shared.labels(model)
        series = [histogram.labels(model) for histogram in histograms]
        self.tokenize, self.queue, self.forward, self.pooling, self.tokens, self.sequences, self.fill = series

    def tokenized(self, texts: int, seconds: float) -> None:
        """One tokenizer call, whatever the number of its texts."""
        self.tokenize.observe(seconds)

    def ran(self, batch: BatchRun) -> None:
        """One batch; those that arrived together waited together, and count once."""
        for seconds, _ in batch.waits:
            self.queue.observe(seconds)
        self.forward.observe(batch.forward_seconds)
        self.pooling.observe(batch.pooling_seconds)
        self.tokens.observe(batch.computed)
        self.sequences.observe(batch.sequences)
        self.fill.observe(batch.computed / batch.budget)
        self.shared.inc(batch.tokens - batch.computed)
        if batch.pictures:
            self.pictures.inc(batch.pictures)


class ModelStates(Collector):
    """The states of models on demand, and what they take.

    read: name, state and memory of each model. total: memory of all that are loaded. limit: of it, None without one.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[tuple[str, str, int]]],
        total: Callable[[], int],
        limit: int | None,
        states: Sequence[str],
    ) -> None:
        self.read, self.total, self.limit, self.states = read, total, limit, states

    def collect(self) -> Iterator[Metric]:
        states = GaugeMetricFamily("poolhouse_model_state", "1 for the state of a model.", labels=("model", "state"))
        sizes = GaugeMetricFamily("poolhouse_model_bytes", "Memory of a loaded model.", labels=("model",))
        for name, current, memory_bytes in self.read():
            for state in self.states:
                states.add_metric((name, state), state == current)
            sizes.add_metric((name,), memory_bytes)
        yield from (states, sizes)
        yield GaugeMetricFamily("poolhouse_models_bytes", "Memory of all loaded models.", self.total())
        if self.limit is not None:
            yield GaugeMetricFamily("poolhouse_memory_limit_bytes", "What they may take together.", self.limit)


# vLLM numbers the engines of one model; there is one.
_LABELS = ("model_name", "engine")
_ENGINE = "0"


class QueuedPrompts(Collector):
    """How many prompts each model has."""

    def __init__(self, queues: Mapping[str, Queue]) -> None:
        self.queues = queues

    def collect(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily(
            "poolhouse_queued_prompts", "Prompts that were accepted and have no answer yet.", labels=("model",)
        )
        for queue in list(self.queues.values()):
            queued.add_metric((queue.name,), queue.waiting())
        yield queued


class ReplicaStates(Collector):
    """The replicas of each model that has any."""

    def __init__(self, engines: Mapping[str, Replicated]) -> None:
        self.engines = engines

    def collect(self) -> Iterator[Metric]:
        labels = ("model", "replica")
        up = GaugeMetricFamily("poolhouse_replica_up", "Whether a replica takes requests.", labels=labels)
        restarts = CounterMetricFamily("poolhouse_replica_restarts", "Deaths of a replica.", labels=labels)
        outstanding = GaugeMetricFamily(
            "poolhouse_replica_outstanding_prompts", "Prompts that a replica has and did not answer yet.", labels=labels
        )
        for name, engine in self.engines.items():
            for state in engine.states:
                where = (name, str(state.number))
                up.add_metric(where, state.up)
                restarts.add_metric(where, state.restarts)
                outstanding.add_metric(where, state.outstanding)
        yield from (up, restarts, outstanding)


class VllmNames(Collector):
    """Our metrics under those of vLLM's names that mean the same; adapters count for the model beneath, as there."""

    def __init__(self, metrics: Metrics, queues: Mapping[str, Queue]) -> None:
        self.metrics = metrics
        self.queues = queues

    def collect(self) -> Iterator[Metric]:
        yield from self._queues()
        tokens = CounterMetricFamily("vllm:prompt_tokens", "Tokens of answered prompts.", labels=_LABELS)
        for model, count in self._sums(self.metrics.tokens.collect()).items():
            tokens.add_metric((model, _ENGINE), count)
        yield tokens
        answered = CounterMetricFamily(
            "vllm:request_success", "Prompts answered.", labels=(*_LABELS, "finished_reason")
        )
        for model, count in self._sums(self.metrics.prompts.collect()).items():
            answered.add_metric((model, _ENGINE, "stop"), count)
        yield answered
        yield self._latencies(self.metrics.seconds)

    def _queues(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Prompts in a batch.", labels=_LABELS)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Prompts that wait for a batch.", labels=_LABELS)
        accepted: Tally[str] = Tally()
        for queue in list(self.queues.values()):
            accepted[queue.model] += queue.waiting()
        for model, prompts in accepted.items():
            # Pieces of long prompts run one by one, so more may run than were accepted.
            now = min(self.queues[model].running(), prompts)
            running.add_metric((model, _ENGINE), now)
            waiting.add_metric((model, _ENGINE), prompts - now)
        yield from (running, waiting)

    def _latencies(self, seconds: Histogram) -> Metric:
        """The whole time of requests that reached a model, whatever their route."""
        family = HistogramMetricFamily(
            "vllm:e2e_request_latency_seconds", "From the headers of a request to the end of its reply.", labels=_LABELS
        )
        totals: dict[str, float] = defaultdict(float)
        buckets: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for sample in self._samples(seconds.collect()):
            model = self.queues[sample.labels["model"]].model
            if sample.name.endswith("_bucket"):
                buckets[model][sample.labels["le"]] += sample.value
            elif sample.name.endswith("_sum"):
                totals[model] += sample.value
        for model, total in totals.items():
            family.add_metric((model, _ENGINE), list(buckets[model].items()), total)
        return family

    def _sums(self, families: Iterable[Metric]) -> Mapping[str, float]:
        """Of a counter, by model."""
        sums: dict[str, float] = defaultdict(float)
        for sample in self._samples(families):
            if sample.name.endswith("_total"):
                sums[self.queues[sample.labels["model"]].model] += sample.value
        return sums

    def _samples(self, families: Iterable[Metric]) -> Iterator[Sample]:
        """Those that belong to a model; requests that were refused before have none."""
        for family in families:
            yield from (sample for sample in family.samples if sample.labels["model"] in self.queues)


@cache
def _phrase(status: int) -> str:
    """The kind of an error that no route named."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Client Closed Request" if status == 499 else "Unknown"
