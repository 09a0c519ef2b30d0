"""Serving: the engines of one server, and how a route gets answers from them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel

from poolhouse.engine.interface import PoolingEngine, WarmUpLevel
from poolhouse.engine.observing import Observer
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.waiting import all_results, with_path
from poolhouse.errors import EngineError, InputTooLong, InvalidRequest, UnknownModel
from poolhouse.server.telemetry import tracing
from poolhouse.server.telemetry.metrics import Metrics, route_of
from poolhouse.server.wire.body import read_json
from poolhouse.server.wire.errors import Disconnected, Overloaded, Refused
from poolhouse.settings import ServerSettings

FieldsT = TypeVar("FieldsT", bound=BaseModel)
_SECONDS_UNWATCHED = 0.05
# Names of models in one message, and characters of a name that none has.
_MOST_NAMES, _LONGEST_NAME = 20, 200


class Serving:
    """Engines by the names that requests may use; the first is the default."""

    def __init__(self, engines: Sequence[PoolingEngine], settings: ServerSettings, metrics: Metrics) -> None:
        names: dict[str, PoolingEngine] = {}
        for engine in engines:
            for name in (engine.facts.name, *engine.facts.aliases):
                # Of engines that share a name, the first has it.
                names.setdefault(name, engine)
        self.engines: Mapping[str, PoolingEngine] = names
        self._unlisted = {name: engine for engine in reversed(engines) for name in engine.facts.unlisted_names}
        self.settings = settings
        self.metrics = metrics
        self.started = int(time.time())
        self._inboxes = {engine.facts.name: Inbox(engine) for engine in names.values()}
        self._admissions = {engine.facts.name: Admission(settings.max_queued_prompts) for engine in names.values()}

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
        several = {engine.facts.name: engine.facts.tasks for engine in list(self.engines.values())[:_MOST_NAMES]}
        told = "; ".join(f"`{name}`: {', '.join(tasks)}" for name, tasks in several.items())
        return f"Served models and their tasks: {told}." if len(several) > 1 else ""

    def waiting(self, engine: PoolingEngine) -> int:
        """Prompts of one engine that wait or run."""
        return self._admissions[engine.facts.name].waiting

    def engine(self, model: str | None) -> PoolingEngine:
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

    def lone_or_named(self, model: str | None) -> PoolingEngine:
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
        engine: PoolingEngine,
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
        http.scope["state"]["model"] = engine.facts.name
        admission = self._admissions[engine.facts.name]
        admission.enter(len(requests))
        submitted = time.perf_counter()
        try:
            if len(requests) == 1:
                self._inboxes[engine.facts.name].put(requests[0])
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

    def _count(
        self, http: HttpRequest, engine: PoolingEngine, requests: Sequence[Request], answers: Sequence[Answer]
    ) -> None:
        tokens = sum(len(answer.tokens) for answer in answers)
        truncated = sum(answer.tokens.truncated for answer in answers)
        task = requests[0].task if requests else "none"
        self.metrics.answered(route_of(http.scope), engine.facts.name, task, len(answers), tokens, truncated)
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


def with_adapters(engines: Sequence[PoolingEngine]) -> list[PoolingEngine]:
    """The engines, and after them one more for each adapter that they have by name; engines' own names win."""
    names = {name for engine in engines for name in (engine.facts.name, *engine.facts.aliases)}
    adapted = [AdaptedEngine(engine, name) for engine in engines for name in engine.facts.adapters if name not in names]
    return [*engines, *adapted]


class AdaptedEngine:
    """An engine whose requests go through one adapter, unless they name another.

    What concerns the engine as a whole (being watched, warmed up, closed) is done to the engine beneath by itself.
    """

    def __init__(self, engine: PoolingEngine, adapter: str) -> None:
        self.engine = engine
        beneath = engine.facts
        self.facts = replace(beneath, name=adapter, aliases=(), unlisted_names=(), adapters=(), parent=beneath.name)
        self.limit, self.tokenize, self.conversation = engine.limit, engine.tokenize, engine.conversation
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


class Inbox:
    """Requests of one prompt, submitted in one call per turn of the event loop.

    A tokenizer call for many short texts costs little more than one for a single text, and so does waking the engine.
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
    """Start work on requests; whatever goes wrong, their futures tell."""
    # A signal would not be raised here: it is the tokenizer's, and the futures say so.
    with suppress(KeyboardInterrupt, SystemExit):
        engine.submit(requests)
