"""Serving: the engines of one server, and how a route gets answers from them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel

from poolhouse.engine.observing import Observer
from poolhouse.engine.options import About
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.waiting import all_results, with_path
from poolhouse.engine.warm_up import WarmUpLevel
from poolhouse.errors import EngineError, InputTooLong, InvalidRequest, UnknownModel
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.listwise import ListwisePrompts
from poolhouse.inputs.templates.score import ScoreTemplate
from poolhouse.packing.tokens import Tokens
from poolhouse.params import PoolingParams
from poolhouse.plugins import Plugin
from poolhouse.server.telemetry import tracing
from poolhouse.server.telemetry.metrics import Metrics, route_of
from poolhouse.server.wire.body import read_json
from poolhouse.server.wire.errors import Disconnected, Overloaded, Refused
from poolhouse.settings import ServerSettings
from poolhouse.tasks import SparseHead, Task
from poolhouse.vectors.precision import Calibration

FieldsT = TypeVar("FieldsT", bound=BaseModel)
_SECONDS_UNWATCHED = 0.05
# Names of models in one message, and characters of a name that none has.
_MOST_NAMES, _LONGEST_NAME = 20, 200


class Engine(Protocol):
    """What a server needs of an engine; `poolhouse.engine.engine.Engine` and `poolhouse.testing.FakeEngine` have it."""

    @property
    def name(self) -> str:
        """The name that replies give, whichever the request used."""
        ...

    @property
    def aliases(self) -> tuple[str, ...]: ...

    @property
    def unlisted_names(self) -> tuple[str, ...]:
        """Names that requests may use, and no list shows."""
        ...

    @property
    def tasks(self) -> tuple[Task, ...]: ...

    @property
    def about(self) -> About:
        """What it tells of itself, for /info."""
        ...

    @property
    def labels(self) -> int: ...

    @property
    def label_names(self) -> Mapping[int, str]: ...

    @property
    def token_weights(self) -> bool:
        """Whether `token_classify` weighs tokens for sparse retrieval."""
        ...

    @property
    def calibration(self) -> Calibration | None:
        """The stored ranges of int8 vectors."""
        ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def prompts(self) -> Mapping[str, str]: ...

    @property
    def adapters(self) -> tuple[str, ...]: ...

    @property
    def alive(self) -> bool: ...

    @property
    def fatal(self) -> EngineError | None:
        """What the engine died of; None while it has not."""
        ...

    @property
    def running(self) -> int:
        """Sequences of the batches on the device."""
        ...

    @property
    def sparse(self) -> SparseHead | None:
        """How answers become sparse vectors; None for a model that has none."""
        ...

    @property
    def plugin(self) -> Plugin | None: ...

    @property
    def similarity(self) -> str:
        """How scores compare two vectors."""
        ...

    @property
    def routed(self) -> bool:
        """Whether queries and documents go separate ways through the model."""
        ...

    @property
    def averages_max_sim(self) -> bool:
        """Whether a late-interaction score is a mean over the query's vectors, not a sum."""
        ...

    @property
    def score_template(self) -> ScoreTemplate | None: ...

    @property
    def listwise(self) -> ListwisePrompts | None: ...

    def limit(self, params: PoolingParams) -> Limit: ...

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]: ...

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...

    def token_strings(self, ids: Sequence[int]) -> list[str]: ...

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]: ...

    def observe(self, observer: Observer | None) -> None: ...

    def on_fatal(self, callback: Callable[[EngineError], None]) -> None: ...

    def warm_up(self, level: WarmUpLevel) -> None: ...

    def close(self, drain_seconds: float = ...) -> None: ...


class Serving:
    """Engines by the names that requests may use; the first is the default."""

    def __init__(self, engines: Sequence[Engine], settings: ServerSettings, metrics: Metrics) -> None:
        names: dict[str, Engine] = {}
        for engine in engines:
            for name in (engine.name, *engine.aliases):
                # Of engines that share a name, the first has it.
                names.setdefault(name, engine)
        self.engines: Mapping[str, Engine] = names
        self._unlisted = {name: engine for engine in reversed(engines) for name in engine.unlisted_names}
        self.settings = settings
        self.metrics = metrics
        self.started = int(time.time())
        self._inboxes = {engine.name: Inbox(engine) for engine in names.values()}
        self._admissions = {engine.name: Admission(settings.max_queued_prompts) for engine in names.values()}

    @property
    def load(self) -> int:
        """Prompts that wait or run."""
        return sum(admission.waiting for admission in self._admissions.values())

    @property
    def only(self) -> bool:
        """Whether one model is served, without adapters; its names do not count."""
        return len(self._inboxes) == 1

    @property
    def names(self) -> str:
        """The names that requests may use, for messages; the first of many."""
        names = list(self.engines)
        more = len(names) - _MOST_NAMES
        return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")

    @property
    def tasks_in_words(self) -> str:
        """Which model has which tasks, for messages; nothing where one model is served."""
        several = {engine.name: engine.tasks for engine in list(self.engines.values())[:_MOST_NAMES]}
        told = "; ".join(f"`{name}`: {', '.join(tasks)}" for name, tasks in several.items())
        return f"Served models and their tasks: {told}." if len(several) > 1 else ""

    def waiting(self, engine: Engine) -> int:
        """Prompts of one engine that wait or run."""
        return self._admissions[engine.name].waiting

    def engine(self, model: str | None) -> Engine:
        """The engine of that name; without a name, the first.

        Raises:
            UnknownModel: no such name.
        """
        if model is None or model == "":
            return next(iter(self.engines.values()))
        if model in self._unlisted and model not in self.engines:
            return self._unlisted[model]
        if model not in self.engines:
            raise UnknownModel(f"{unknown(model)} Served models: {self.names}.", None)
        return self.engines[model]

    def lone_or_named(self, model: str | None) -> Engine:
        """As `engine`, but a lone model answers whatever it is called, as peers do that know one model alone.

        Raises:
            UnknownModel: one of several is asked for, by a name that none has.
        """
        return self.engine(None if self.only and model not in self.engines else model)

    async def read(self, http: HttpRequest, fields: type[FieldsT]) -> FieldsT:
        """The body of a request.

        Raises:
            Refused, ValidationError: it is none, or not of these fields.
        """
        return self.parse(await read_json(http, self.settings), fields)

    def parse(self, body: dict[str, Any], fields: type[FieldsT]) -> FieldsT:
        """A body that was read already; see `read`."""
        started = time.perf_counter()
        parsed = fields.model_validate(body)
        self.metrics.parse_seconds.observe(time.perf_counter() - started)
        return parsed

    def check_items(self, items: int, parameter: str) -> None:
        """Raise InvalidRequest for more inputs than one request may hold."""
        most = self.settings.max_client_batch_size
        if items > most:
            raise InvalidRequest(
                f"{parameter} has {items} entries; one request may hold {most} (--max-client-batch-size).",
                parameter,
                items,
            )

    def check_list(self, given: object, parameter: str) -> None:
        """As `check_items`, of what was not read yet: reading millions of inputs would stop the server for seconds."""
        if isinstance(given, list) and given and not isinstance(given[0], int):
            self.check_items(len(given), parameter)

    async def answers(
        self,
        http: HttpRequest,
        engine: Engine,
        requests: Sequence[Request],
        place: Callable[[int], str] = "input[{}]".format,
    ) -> list[Answer]:
        """Answers in order; a client that hangs up takes its prompts out of the queue.

        place: where in the body the prompt of a request stands, for messages.

        Raises:
            Overloaded: the queue is full. Refused: too long a wait. Disconnected: the client is gone. Otherwise the error
            of the first prompt that has one.
        """
        # Failures too are counted and logged by their model.
        http.scope["state"]["model"] = engine.name
        admission = self._admissions[engine.name]
        admission.enter(len(requests))
        submitted = time.perf_counter()
        try:
            if len(requests) == 1:
                self._inboxes[engine.name].put(requests[0])
            else:
                submit(engine, requests)
            futures = [request.future for request in requests]
            try:
                answers = await self._answered(http, futures)
            except InvalidRequest as error:
                raise _located(error, futures, place) from None
        finally:
            admission.leave(len(requests))
        self._count(http, engine, requests, answers)
        tracing.note(http.scope["state"], submitted, answers)
        return answers

    async def _answered(self, http: HttpRequest, futures: Sequence[Future[Answer]]) -> list[Answer]:
        loop = asyncio.get_running_loop()
        answering = all_results(futures)
        watches: list[asyncio.Task[None]] = []
        # Most answers are there before it is worth to look whether somebody still waits for them.
        later = loop.call_later(
            _SECONDS_UNWATCHED, lambda: watches.append(loop.create_task(self._watch(http, answering)))
        )
        try:
            return await answering
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        finally:
            later.cancel()
            for watch in watches:
                watch.cancel()

    async def _watch(self, http: HttpRequest, answering: asyncio.Future[list[Answer]]) -> None:
        """Give up on answers when the client is gone, or the time is over."""
        seconds = self.settings.request_timeout_seconds
        error: Exception = Disconnected()
        try:
            async with asyncio.timeout(seconds - _SECONDS_UNWATCHED):
                # After the body, the next thing that a client can send is that it is gone.
                await http.receive()
        except TimeoutError:
            error = Refused(f"There was no answer within {seconds:g} seconds (--request-timeout-seconds).", 504)
        if not answering.done():
            answering.set_exception(error)

    def _count(self, http: HttpRequest, engine: Engine, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        tokens = sum(len(answer.tokens) for answer in answers)
        truncated = sum(answer.tokens.truncated for answer in answers)
        task = requests[0].task if requests else "none"
        self.metrics.answered(route_of(http.scope), engine.name, task, len(answers), tokens, truncated)
        state = http.scope["state"]
        # Some routes ask several times for one request.
        state["items"] = state.get("items", 0) + len(answers)
        state["tokens"] = state.get("tokens", 0) + tokens
        if truncated:
            state["truncated"] = state.get("truncated", 0) + truncated
        state["answers"] = answers


def unknown(model: str) -> str:
    """What is said of a name that no model has, as much of it as a name may be."""
    return f"The model `{model[:_LONGEST_NAME]}` does not exist."


def _located(error: InvalidRequest, futures: Sequence[Future[Answer]], place: Callable[[int], str]) -> InvalidRequest:
    """The error with the place of its prompt, where there are several and not all are refused alike."""
    if len(futures) < 2 or (_words(futures[0]) == _words(futures[-1]) and not isinstance(error, InputTooLong)):
        return error
    return with_path(error, futures, place)


def _words(future: Future[Answer]) -> str | None:
    failed = future.done() and not future.cancelled() and future.exception() is not None
    return str(future.exception()) if failed else None


def with_adapters(engines: Sequence[Engine]) -> list[Engine]:
    """The engines, and after them one more for each adapter that they have by name; engines' own names win."""
    names = {name for engine in engines for name in (engine.name, *engine.aliases)}
    adapted = [AdaptedEngine(engine, name) for engine in engines for name in engine.adapters if name not in names]
    return [*engines, *adapted]


class AdaptedEngine:
    """An engine whose requests go through one adapter, unless they name another."""

    def __init__(self, engine: Engine, adapter: str) -> None:
        self.engine, self.name = engine, adapter

    @property
    def parent(self) -> str:
        """The name of the model beneath."""
        return self.engine.name

    @property
    def aliases(self) -> tuple[str, ...]:
        return ()

    @property
    def unlisted_names(self) -> tuple[str, ...]:
        return ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.engine.tasks

    @property
    def about(self) -> About:
        return self.engine.about

    @property
    def labels(self) -> int:
        return self.engine.labels

    @property
    def label_names(self) -> Mapping[int, str]:
        return self.engine.label_names

    @property
    def token_weights(self) -> bool:
        return self.engine.token_weights

    @property
    def calibration(self) -> Calibration | None:
        return self.engine.calibration

    @property
    def max_tokens(self) -> int:
        return self.engine.max_tokens

    @property
    def prompts(self) -> Mapping[str, str]:
        return self.engine.prompts

    @property
    def adapters(self) -> tuple[str, ...]:
        return ()

    @property
    def alive(self) -> bool:
        return self.engine.alive

    @property
    def fatal(self) -> EngineError | None:
        return self.engine.fatal

    @property
    def running(self) -> int:
        return self.engine.running

    @property
    def sparse(self) -> SparseHead | None:
        return self.engine.sparse

    @property
    def plugin(self) -> Plugin | None:
        return self.engine.plugin

    @property
    def similarity(self) -> str:
        return self.engine.similarity

    @property
    def routed(self) -> bool:
        return self.engine.routed

    @property
    def averages_max_sim(self) -> bool:
        return self.engine.averages_max_sim

    @property
    def score_template(self) -> ScoreTemplate | None:
        return self.engine.score_template

    @property
    def listwise(self) -> ListwisePrompts | None:
        return self.engine.listwise

    def limit(self, params: PoolingParams) -> Limit:
        return self.engine.limit(params)

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]:
        return self.engine.tokenize(requests)

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.engine.detokenize(ids, skip_special_tokens)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        return self.engine.token_strings(ids)

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]:
        return self.engine.submit(
            [request if request.adapter is not None else replace(request, adapter=self.name) for request in requests]
        )

    def observe(self, observer: Observer | None) -> None:
        """Nothing: the engine beneath tells of its work by itself."""

    def on_fatal(self, callback: Callable[[EngineError], None]) -> None:
        self.engine.on_fatal(callback)

    def warm_up(self, level: WarmUpLevel) -> None:
        """Nothing: the engine beneath is warmed up by itself."""

    def close(self, drain_seconds: float = 30.0) -> None:
        """Nothing: the engine beneath is closed by itself."""


# Of the rate at which prompts are answered, which tells how long the queue is in seconds.
_HALF_LIFE_SECONDS = 10.0
_LONGEST_RETRY_SECONDS = 60.0


class Admission:
    """Counts the prompts that were accepted and not yet answered; belongs to one event loop.

    most: prompts at once. A request of any size is taken while nothing waits.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.waiting = 0
        self._rate = 0.0
        self._seen = time.monotonic()

    def enter(self, prompts: int) -> None:
        """Accept that many prompts.

        Raises:
            Overloaded: too many wait already.
        """
        if self.waiting and self.waiting + prompts > self.most:
            raise Overloaded(
                f"The server is overloaded: {self.waiting} prompts wait, and {self.most} may. Come again later.",
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
        too_many = self.waiting + prompts - self.most
        return min(too_many / self._rate if self._rate else 1.0, _LONGEST_RETRY_SECONDS)


class Submitter(Protocol):
    """What an engine must have."""

    def submit(self, requests: Sequence[Request]) -> object: ...


class Inbox:
    """Requests of one prompt, submitted in one call per turn of the event loop.

    A tokenizer call for many short texts costs little more than one for a single text, and so does waking the engine.
    """

    def __init__(self, engine: Submitter) -> None:
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


def submit(engine: Submitter, requests: Sequence[Request]) -> None:
    """Start work on requests; whatever goes wrong, their futures tell."""
    # A signal would not be raised here: it is the tokenizer's, and the futures say so.
    with suppress(KeyboardInterrupt, SystemExit):
        engine.submit(requests)
