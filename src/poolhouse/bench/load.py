"""Load on a running server of any dialect: requests at a rate or as fast as they are answered, each one timed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import orjson

from poolhouse.bench.http import BadReply, Connection, Target
from poolhouse.data import queries
from poolhouse.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, where and how fast.

    endpoint: the path, where it is not the backend's own. model: none leaves it out of the bodies.
    requests_per_second: of arrivals at random (a Poisson process); none sends as soon as a connection is free.
    concurrency: connections, and so the most requests in flight. warmup: requests before those that count.
    extra: fields added to every body. seconds_to_wait: after them a request has failed.
    """

    url: str = "http://127.0.0.1:8000"
    backend: str = "openai-embeddings"
    endpoint: str | None = None
    model: str | None = None
    api_key: str | None = None
    requests: int = 1000
    concurrency: int = 32
    requests_per_second: float | None = None
    items_per_request: int = 1
    encoding: str = "float"
    extra: Mapping[str, object] | None = None
    warmup: int = 32
    seconds_to_wait: float = 60.0
    seed: int = 0


Body = dict[str, object]


@dataclass(frozen=True, slots=True)
class Backend:
    """A route of a server.

    body: a query and the items of a request to its body; only rerankers look at the query.
    answers: a parsed reply to the list that holds an answer per item; may raise KeyError, TypeError, AttributeError or
    StopIteration on a reply of another shape.
    base64: further fields of a body whose vectors shall come in base64; None where that is not offered.
    float: the same for numbers, where they are not the default of the route.
    """

    path: str
    body: Callable[[str, Sequence[str]], Body]
    answers: Callable[[Any], object]
    base64: Mapping[str, object] | None = None
    float: Mapping[str, object] | None = None


def _one_or_many(field: str) -> Callable[[str, Sequence[str]], Body]:
    """A single text stands alone, as clients send it."""
    return lambda _, items: {field: items[0] if len(items) == 1 else list(items)}


def _many(field: str) -> Callable[[str, Sequence[str]], Body]:
    return lambda _, items: {field: list(items)}


def _ranked(documents: str, query: str = "query", **fixed: object) -> Callable[[str, Sequence[str]], Body]:
    return lambda text, items: {query: text, documents: list(items), **fixed}


def _under(field: str) -> Callable[[Any], object]:
    return lambda reply: reply[field]


def _bare(reply: object) -> object:
    return reply


def _of_first_type(reply: Any) -> object:
    """Cohere's vectors, of the type that was requested; its replies name the other types too, as null."""
    return next(vectors for vectors in reply["embeddings"].values() if vectors)


_OPENAI_FORMS: dict[str, Mapping[str, object]] = {
    "base64": {"encoding_format": "base64"},
    "float": {"encoding_format": "float"},
}
BACKENDS: Mapping[str, Backend] = {
    "openai-embeddings": Backend("/v1/embeddings", _one_or_many("input"), _under("data"), **_OPENAI_FORMS),
    "vllm-pooling": Backend("/pooling", _one_or_many("input"), _under("data"), **_OPENAI_FORMS),
    "vllm-classify": Backend("/classify", _one_or_many("input"), _under("data")),
    "vllm-score": Backend("/score", _ranked("text_2", query="text_1"), _under("data")),
    "vllm-rerank": Backend("/rerank", _ranked("documents"), _under("results")),
    # No input_type, which Cohere itself demands: servers refuse it for models without prompts.
    "cohere-embed": Backend(
        "/v2/embed",
        _many("texts"),
        _of_first_type,
        base64={"embedding_types": ["base64"]},
        float={"embedding_types": ["float"]},
    ),
    "cohere-rerank": Backend("/v2/rerank", _ranked("documents"), _under("results")),
    "jina-embeddings": Backend("/v1/embeddings", _many("input"), _under("data"), base64={"embedding_type": "base64"}),
    "jina-rerank": Backend("/v1/rerank", _ranked("documents", return_documents=False), _under("results")),
    "voyage-embeddings": Backend(
        "/v1/embeddings", _many("input"), _under("data"), base64={"encoding_format": "base64"}
    ),
    "voyage-rerank": Backend("/v1/rerank", _ranked("documents"), _under("data")),
    "tei-embed": Backend("/embed", _one_or_many("inputs"), _bare),
    "tei-embed-sparse": Backend("/embed_sparse", _one_or_many("inputs"), _bare),
    # Two bare texts would be a pair; a list of lists never is.
    "tei-predict": Backend("/predict", lambda _, items: {"inputs": [[item] for item in items]}, _bare),
    "tei-rerank": Backend("/rerank", _ranked("texts"), _bare),
    "infinity-embeddings": Backend("/embeddings", _many("input"), _under("data"), **_OPENAI_FORMS),
    "infinity-classify": Backend("/classify", _many("input"), _under("data")),
    "infinity-rerank": Backend("/rerank", _ranked("documents"), _under("results")),
    "nvidia-ranking": Backend(
        "/v1/ranking",
        lambda query, items: {"query": {"text": query}, "passages": [{"text": item} for item in items]},
        _under("rankings"),
    ),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: seconds from when it was due until its reply was read; `failure` is none, or a kind and a message."""

    seconds: float
    size: int = 0
    tokens: int = 0
    failure: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """All requests that count, and how long they took; `own_seconds` is the processor time of this process."""

    outcomes: Sequence[Outcome]
    seconds: float
    own_seconds: float


def bodies(load: Load, texts: Sequence[str]) -> list[bytes]:
    """The JSON bodies of a load, warm-up first; texts are used in turn.

    Raises:
        ConfigError: the backend has no such encoding.
    """
    backend = BACKENDS[load.backend]
    fixed: Body = {} if load.model is None else {"model": load.model}
    if load.encoding == "base64":
        if backend.base64 is None:
            offering = ", ".join(name for name, other in BACKENDS.items() if other.base64)
            raise ConfigError(f"{load.backend} has no base64; these have: {offering}.")
        fixed |= backend.base64
    else:
        fixed |= backend.float or {}
    fixed |= load.extra or {}
    texts_of_queries = queries()
    size = load.items_per_request
    return [
        orjson.dumps(
            backend.body(
                texts_of_queries[number % len(texts_of_queries)],
                [texts[(number * size + item) % len(texts)] for item in range(size)],
            )
            | fixed
        )
        for number in range(load.warmup + load.requests)
    ]


def run_load(load: Load, texts: Sequence[str]) -> Run:
    """Send the load and wait for the last reply.

    Raises:
        ConfigError: the URL or the encoding is not possible.
    """
    backend = BACKENDS[load.backend]
    headers = {} if load.api_key is None else {"Authorization": f"Bearer {load.api_key}"}
    target = Target.of(load.url.rstrip("/") + (load.endpoint or backend.path), headers)
    requests = [target.request(body) for body in bodies(load, texts)]
    client = _Client(load, backend, [Connection(target) for _ in range(load.concurrency)])
    return _run(client.run(requests[: load.warmup], requests[load.warmup :]))


class _Client:
    """Connections that take the next request when they are done with the last."""

    def __init__(self, load: Load, backend: Backend, connections: Sequence[Connection]) -> None:
        self.load = load
        self.backend = backend
        self.connections = connections

    async def run(self, warmup: Sequence[bytes], requests: Sequence[bytes]) -> Run:
        await self._send(iter([(0.0, request) for request in warmup]), [])
        outcomes: list[Outcome] = []
        # Every due time is drawn beforehand; the clock starts once they are.
        dues = list(_dues(self.load, len(requests)))
        started, own = time.perf_counter(), time.process_time()
        await self._send(((started + due, request) for due, request in zip(dues, requests, strict=True)), outcomes)
        ended = time.perf_counter()
        for connection in self.connections:
            connection.close()
        return Run(outcomes, ended - started, time.process_time() - own)

    async def _send(self, requests: Iterator[tuple[float, bytes]], outcomes: list[Outcome]) -> None:
        await asyncio.gather(*(self._work(connection, requests, outcomes) for connection in self.connections))

    async def _work(
        self, connection: Connection, requests: Iterator[tuple[float, bytes]], outcomes: list[Outcome]
    ) -> None:
        for due, request in requests:
            # A loop may wake a little early, by the resolution of its clock.
            while (now := time.perf_counter()) < due:
                await asyncio.sleep(due - now)
            # At a rate, waiting for a free connection is part of the latency: a slow server must not set its own pace.
            outcomes.append(await self._outcome(connection, request, due if self.load.requests_per_second else now))

    async def _outcome(self, connection: Connection, request: bytes, due: float) -> Outcome:
        try:
            async with asyncio.timeout(self.load.seconds_to_wait):
                reply = await connection.ask(request)
        except TimeoutError:
            message = f"There was no reply within {self.load.seconds_to_wait:g} s."
            return Outcome(time.perf_counter() - due, failure=("timeout", message))
        except (OSError, BadReply) as error:
            kind = "no connection" if isinstance(error, OSError) else "broken reply"
            return Outcome(time.perf_counter() - due, failure=(kind, str(error) or type(error).__name__))
        seconds = time.perf_counter() - due
        if reply.status != 200:
            return Outcome(seconds, reply.size, failure=(f"HTTP {reply.status}", said_by(reply.body)))
        try:
            tokens = check_answers(self.backend, reply.body, self.load.items_per_request)
        except WrongReply as error:
            return Outcome(seconds, reply.size, failure=("wrong reply", str(error)))
        return Outcome(seconds, reply.size, tokens)


def _dues(load: Load, count: int) -> Iterator[float]:
    """Seconds after the start at which each request is due."""
    source = random.Random(load.seed)  # noqa: S311 - repeatable, not secret
    due = 0.0
    for _ in range(count):
        yield due
        if load.requests_per_second is not None:
            due += source.expovariate(load.requests_per_second)


def _run(work: Coroutine[object, None, Run]) -> Run:
    """The result of a coroutine, by uvloop where it is installed: it halves what a request costs this process."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


@dataclass(frozen=True, slots=True)
class Failures:
    """Requests that failed in one way, and the message of the first."""

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


class WrongReply(Exception):
    """A reply of status 200 that does not answer the request."""


def check_answers(backend: Backend, body: bytes, items: int) -> int:
    """The tokens that the reply counts, 0 where it counts none.

    Raises:
        WrongReply: no JSON, another shape, or not as many answers as items.
    """
    try:
        reply = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise WrongReply(f"The reply is no JSON; it begins with {body[:60]!r}.") from None
    try:
        answers = backend.answers(reply)
        count = len(answers) if isinstance(answers, list) else None
    except (KeyError, TypeError, AttributeError, StopIteration):
        count = None
    if count is None:
        raise WrongReply(f"The reply is of another shape than this backend's; it begins with {body[:60]!r}.")
    if count != items:
        raise WrongReply(f"The reply holds {count} answers to {items} items.")
    usage = reply.get("usage") if isinstance(reply, dict) else None
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else 0


def said_by(body: bytes) -> str:
    """The message of an error reply, in any dialect; at most 300 characters."""
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        message = body.decode("utf-8", "replace")
    while isinstance(message, dict):
        message = next((message[name] for name in ("message", "error", "detail") if message.get(name)), str(message))
    return str(message).strip()[:300]
