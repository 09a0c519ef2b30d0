"""Requests to a running server: sent at a rate or as fast as they are answered, each one timed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from poolhouse.bench.backends import BACKENDS, Backend, WrongReply, check_answers, said_by
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
    extra: Mapping[str, Any] | None = None
    warmup: int = 32
    seconds_to_wait: float = 60.0
    seed: int = 0


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
    fixed: dict[str, Any] = {} if load.model is None else {"model": load.model}
    if load.encoding == "base64":
        if backend.base64 is None:
            offering = ", ".join(name for name, other in BACKENDS.items() if other.base64)
            raise ConfigError(f"{load.backend} has no base64; these have: {offering}.")
        fixed |= backend.base64
    else:
        fixed |= backend.float or {}
    fixed |= load.extra or {}
    asked = queries()
    size = load.items_per_request
    return [
        orjson.dumps(
            backend.body(
                asked[number % len(asked)], [texts[(number * size + item) % len(texts)] for item in range(size)]
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


def _run(work: Coroutine[Any, Any, Run]) -> Run:
    """The result of a coroutine, by uvloop where it is installed: it halves what a request costs this process."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)
