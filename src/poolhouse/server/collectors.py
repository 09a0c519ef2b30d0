"""What is read only when Prometheus asks: queues, and what vLLM counts, under vLLM's names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from poolhouse.engine.interface import PoolingEngine
from poolhouse.server.engines import Serving

# vLLM numbers the engines of one model; there is one.
_LABELS = ("model_name", "engine")
_ENGINE = "0"


def register(serving: Serving) -> None:
    """Let the metrics of this server tell of its queues, and speak vLLM's names too."""
    serving.metrics.registry.register(Queues(serving))
    serving.metrics.registry.register(VllmNames(serving))


class Queues(Collector):
    """How many prompts each model has."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    def collect(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily(
            "poolhouse_queued_prompts", "Prompts that were accepted and have no answer yet.", labels=("model",)
        )
        for engine in _engines(self.serving).values():
            queued.add_metric((engine.facts.name,), self.serving.waiting(engine))
        yield queued


class VllmNames(Collector):
    """Ours under the names of vLLM's that mean the same; adapters count for the model beneath, as there."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.models = {name: _model(engine) for name, engine in _engines(serving).items()}

    def collect(self) -> Iterator[Metric]:
        yield from self._queues()
        metrics = self.serving.metrics
        tokens = CounterMetricFamily("vllm:prompt_tokens", "Tokens of answered prompts.", labels=_LABELS)
        for model, count in self._sums(metrics.tokens.collect()).items():
            tokens.add_metric((model, _ENGINE), count)
        yield tokens
        answered = CounterMetricFamily(
            "vllm:request_success", "Prompts answered.", labels=(*_LABELS, "finished_reason")
        )
        for model, count in self._sums(metrics.prompts.collect()).items():
            answered.add_metric((model, _ENGINE, "stop"), count)
        yield answered
        yield self._latencies(metrics.seconds)

    def _queues(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Prompts in a batch.", labels=_LABELS)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Prompts that wait for a batch.", labels=_LABELS)
        engines = _engines(self.serving)
        accepted: Counter[str] = Counter()
        for name, engine in engines.items():
            accepted[self.models[name]] += self.serving.waiting(engine)
        for model, prompts in accepted.items():
            # Pieces of long prompts run one by one, so more may run than were asked.
            now = min(engines[model].running, prompts)
            running.add_metric((model, _ENGINE), now)
            waiting.add_metric((model, _ENGINE), prompts - now)
        yield from (running, waiting)

    def _latencies(self, seconds: Histogram) -> Metric:
        """The whole time of requests that reached a model, whatever their route."""
        family = HistogramMetricFamily(
            "vllm:e2e_request_latency_seconds", "From the head of a request to the end of its reply.", labels=_LABELS
        )
        totals: dict[str, float] = defaultdict(float)
        buckets: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for sample in self._samples(seconds.collect()):
            model = self.models[sample.labels["model"]]
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
                sums[self.models[sample.labels["model"]]] += sample.value
        return sums

    def _samples(self, families: Iterable[Metric]) -> Iterator[Sample]:
        """Those that belong to a model; requests that were refused before have none."""
        for family in families:
            yield from (sample for sample in family.samples if sample.labels["model"] in self.models)


def _engines(serving: Serving) -> dict[str, PoolingEngine]:
    """Each engine once, by its own name."""
    return {engine.facts.name: engine for engine in serving.engines.values()}


def _model(engine: PoolingEngine) -> str:
    """The name of the model that answers: an adapter's is that of the engine beneath."""
    name: str = engine.facts.parent or engine.facts.name
    return name
