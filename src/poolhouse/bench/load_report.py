"""What a load came to: successes, failures, rates and latencies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np

from poolhouse.bench.backends import BACKENDS
from poolhouse.bench.load import Load, Run


@dataclass(frozen=True, slots=True)
class Failures:
    """Requests that failed in one way, and what the first of them said."""

    kind: str
    count: int
    message: str


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds until a request was answered; percentiles as pairs of percent and milliseconds."""

    mean: float
    percentiles: tuple[tuple[float, float], ...]
    max: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Figures of one load; rates and latency count the requests that were answered.

    tokens: as the replies count them, 0 where they do not. client_load: processor time of the client per second; near 1
    the client was the limit.
    """

    url: str
    backend: str
    endpoint: str
    model: str | None
    requests: int
    items_per_request: int
    concurrency: int
    request_rate: float | None
    encoding_format: str
    seed: int
    successes: int
    failures: tuple[Failures, ...]
    seconds: float
    requests_per_second: float
    items_per_second: float
    tokens: int
    tokens_per_second: float
    latency_ms: Latency | None
    bytes_received: int
    client_load: float

    @classmethod
    def of(cls, load: Load, run: Run, percentiles: Sequence[float] = (50, 90, 99)) -> LoadReport:
        """The figures of a run."""
        answered = [outcome for outcome in run.outcomes if outcome.failure is None]
        tokens = sum(outcome.tokens for outcome in answered)
        return cls(
            url=load.url,
            backend=load.backend,
            endpoint=load.endpoint or BACKENDS[load.backend].path,
            model=load.model,
            requests=load.requests,
            items_per_request=load.items_per_request,
            concurrency=load.concurrency,
            request_rate=load.requests_per_second,
            encoding_format=load.encoding,
            seed=load.seed,
            successes=len(answered),
            failures=_failures(run),
            seconds=run.seconds,
            requests_per_second=len(answered) / run.seconds,
            items_per_second=len(answered) * load.items_per_request / run.seconds,
            tokens=tokens,
            tokens_per_second=tokens / run.seconds,
            latency_ms=_latency([1000 * outcome.seconds for outcome in answered], percentiles),
            bytes_received=sum(outcome.size for outcome in run.outcomes),
            client_load=run.own_seconds / run.seconds,
        )

    def as_json(self) -> str:
        """The report as one JSON object; percentiles are an object by their names, such as p50."""
        facts = asdict(self)
        if self.latency_ms is not None:
            named = {f"p{percent:g}": value for percent, value in self.latency_ms.percentiles}
            facts["latency_ms"] = {"mean": self.latency_ms.mean, **named, "max": self.latency_ms.max}
        return json.dumps(facts, indent=2)


def _failures(run: Run) -> tuple[Failures, ...]:
    failed = [outcome.failure for outcome in run.outcomes if outcome.failure is not None]
    counts = Counter(kind for kind, _ in failed)
    first = dict(reversed(failed))
    return tuple(Failures(kind, count, first[kind]) for kind, count in counts.most_common())


def _latency(milliseconds: Sequence[float], percentiles: Sequence[float]) -> Latency | None:
    if not milliseconds:
        return None
    values = np.percentile(milliseconds, percentiles)
    return Latency(
        fmean(milliseconds),
        tuple((percent, float(value)) for percent, value in zip(percentiles, values, strict=True)),
        max(milliseconds),
    )
