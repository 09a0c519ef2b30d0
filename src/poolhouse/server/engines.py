"""Engines: those of one server by name, adapters among them, and how many prompts may wait for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace

from poolhouse.engine.interface import PoolingEngine, WarmUpLevel
from poolhouse.engine.observing import Observer
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import EngineError, InvalidRequest, UnknownModel
from poolhouse.server.telemetry.metrics import Metrics
from poolhouse.server.wire.errors import Overloaded
from poolhouse.settings import ServerSettings

# Names of models in one message, and characters of an unknown name.
_MAX_NAMES, _MAX_NAME = 20, 200


class Engines:
    """Engines by the names that requests may use; the first is the default."""

    def __init__(self, engines: Sequence[PoolingEngine], settings: ServerSettings, metrics: Metrics) -> None:
        names: dict[str, PoolingEngine] = {}
        for engine in engines:
            for name in (engine.facts.name, *engine.facts.aliases):
                # Of engines that share a name, the first has it.
                names.setdefault(name, engine)
        self.by_name: Mapping[str, PoolingEngine] = names
        self._unlisted = {name: engine for engine in reversed(engines) for name in engine.facts.unlisted_names}
        self.settings = settings
        self.metrics = metrics
        self.started = int(time.time())
        self._singles = {engine.facts.name: SingleRequests(engine) for engine in names.values()}
        self._admissions = {engine.facts.name: Admission(settings.max_queued_prompts) for engine in names.values()}

    @property
    def load(self) -> int:
        """Prompts that wait or run."""
        return sum(admission.waiting for admission in self._admissions.values())

    @property
    def only(self) -> bool:
        """Whether one model is served, without adapters; its names do not count."""
        return len(self._admissions) == 1

    @property
    def names(self) -> str:
        """The names that requests may use, for messages; the first of many."""
        names = list(self.by_name)
        more = len(names) - _MAX_NAMES
        return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")

    @property
    def tasks_by_model(self) -> str:
        """The tasks of each model, for messages; empty where one model is served."""
        several = {engine.facts.name: engine.facts.tasks for engine in list(self.by_name.values())[:_MAX_NAMES]}
        listed = "; ".join(f"`{name}`: {', '.join(tasks)}" for name, tasks in several.items())
        return f"Served models and their tasks: {listed}." if len(several) > 1 else ""

    def waiting(self, engine: PoolingEngine) -> int:
        """Prompts of one engine that wait or run."""
        return self._admissions[engine.facts.name].waiting

    def engine(self, model: str | None) -> PoolingEngine:
        """The engine of that name; without a name, the first.

        Raises:
            UnknownModel: no such name.
        """
        if model is None or model == "":
            return next(iter(self.by_name.values()))
        if model in self._unlisted and model not in self.by_name:
            return self._unlisted[model]
        if model not in self.by_name:
            raise UnknownModel(f"{unknown(model)} Served models: {self.names}.", None)
        return self.by_name[model]

    def single_or_named(self, model: str | None) -> PoolingEngine:
        """As `engine`, but a single model answers to every name, as in servers that have one model only.

        Raises:
            UnknownModel: there are several models, and none of that name.
        """
        return self.engine(None if self.only and model not in self.by_name else model)

    def check_items(self, items: int, parameter: str) -> None:
        """Raise InvalidRequest for more inputs than one request may hold."""
        max_items = self.settings.max_client_batch_size
        if items > max_items:
            raise InvalidRequest(
                f"{parameter} has {items} entries; one request may hold {max_items} (--max-client-batch-size).",
                parameter,
                items,
            )

    def check_list(self, value: object, parameter: str) -> None:
        """As `check_items`, before the inputs are parsed: parsing millions would stop the event loop for seconds."""
        if isinstance(value, list) and value and not isinstance(value[0], int):
            self.check_items(len(value), parameter)

    @contextmanager
    def accepted(self, engine: PoolingEngine, requests: Sequence[Request], behind: bool = False) -> Iterator[None]:
        """Submit requests to an engine of these; they count as waiting until the block ends.

        behind: of a batch, which itself bounds how many wait: they take no place from those of clients.

        Raises:
            Overloaded: the queue is full.
        """
        name = engine.facts.name
        if not behind:
            self._admissions[name].enter(len(requests))
        try:
            if len(requests) == 1:
                self._singles[name].put(requests[0])
            else:
                submit(engine, requests)
            yield
        finally:
            if not behind:
                self._admissions[name].leave(len(requests))


def unknown(model: str) -> str:
    """The message for an unknown name; a long name is cut."""
    return f"The model `{model[:_MAX_NAME]}` does not exist."


def with_adapters(engines: Sequence[PoolingEngine]) -> list[PoolingEngine]:
    """The engines, and after them one more for each adapter that they have by name; engines' own names win."""
    names = {name for engine in engines for name in (engine.facts.name, *engine.facts.aliases)}
    adapted = [AdaptedEngine(engine, name) for engine in engines for name in engine.facts.adapters if name not in names]
    return [*engines, *adapted]


class AdaptedEngine:
    """An engine whose requests go through one adapter, unless they name another.

    The engine beneath is observed, warmed up and closed by itself, so these methods do nothing here.
    """

    def __init__(self, engine: PoolingEngine, adapter: str) -> None:
        self.engine = engine
        beneath = engine.facts
        self.facts = replace(beneath, name=adapter, aliases=(), unlisted_names=(), adapters=(), parent=beneath.name)
        self.limit, self.tokenize = engine.limit, engine.tokenize
        self.detokenize, self.token_strings, self.on_fatal = engine.detokenize, engine.token_strings, engine.on_fatal

    @property
    def alive(self) -> bool:
        return self.engine.alive

    @property
    def fatal(self) -> EngineError | None:
        return self.engine.fatal

    @property
    def pending(self) -> int:
        return self.engine.pending

    @property
    def running(self) -> int:
        return self.engine.running

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]:
        name = self.facts.name
        return self.engine.submit(
            [request if request.adapter is not None else replace(request, adapter=name) for request in requests]
        )

    def observe(self, observer: Observer | None) -> None: ...

    def warm_up(self, level: WarmUpLevel) -> None: ...

    def close(self, drain_seconds: float = 30.0) -> None: ...


# The rate of answers is a mean that forgets half of the past in so many seconds.
_HALF_LIFE_SECONDS = 10.0
_MAX_RETRY_SECONDS = 60.0


class Admission:
    """Counts the prompts that were accepted and not yet answered; belongs to one event loop.

    max_waiting: prompts at once. While nothing waits, a request of any size is accepted.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.waiting = 0
        self._rate = 0.0
        self._seen = time.monotonic()

    def enter(self, prompts: int) -> None:
        """Accept that many prompts.

        Raises:
            Overloaded: too many wait already.
        """
        if self.waiting and self.waiting + prompts > self.max_waiting:
            raise Overloaded(
                f"The server is overloaded: {self.waiting} prompts wait, and {self.max_waiting} may. Come again later.",
                self._retry_after(prompts),
            )
        self.waiting += prompts

    def leave(self, prompts: int) -> None:
        """That many are answered, or wait no longer."""
        self.waiting -= prompts
        now = time.monotonic()
        passed = max(now - self._seen, 1e-6)
        self._seen = now
        kept: float = 0.5 ** (passed / _HALF_LIFE_SECONDS)
        self._rate = kept * self._rate + (1 - kept) * prompts / passed

    def _retry_after(self, prompts: int) -> float:
        """Seconds until there should be room, at the rate of the last while."""
        too_many = self.waiting + prompts - self.max_waiting
        return min(too_many / self._rate if self._rate else 1.0, _MAX_RETRY_SECONDS)


class SingleRequests:
    """Collects requests of one prompt, and submits them in one call per turn of the event loop.

    Tokenising many short texts in one call, and waking the engine once, costs little more than doing it for one text.
    """

    def __init__(self, engine: PoolingEngine) -> None:
        self.engine = engine
        self._requests: list[Request] = []

    def put(self, request: Request) -> None:
        """Submit the request before the loop's next turn."""
        if not self._requests:
            asyncio.get_running_loop().call_soon(self._submit)
        self._requests.append(request)

    def _submit(self) -> None:
        requests, self._requests = self._requests, []
        submit(self.engine, requests)


def submit(engine: PoolingEngine, requests: Sequence[Request]) -> None:
    """Submit requests; their futures carry every error."""
    # The tokenizer's own exceptions, not a signal: the futures carry them.
    with suppress(KeyboardInterrupt, SystemExit):
        engine.submit(requests)
