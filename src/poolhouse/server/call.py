"""Call: one request on its way through a route, from its body to its reply."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.waiting import all_results, with_path
from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.server.engines import Engines
from poolhouse.server.served import Served
from poolhouse.server.telemetry import tracing
from poolhouse.server.telemetry.metrics import route_of
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Disconnected, Refused, Shape, Unavailable
from poolhouse.settings import ServerSettings

FieldsT = TypeVar("FieldsT", bound=BaseModel)
# The JSON object, or map, of a body.
JsonObject = Mapping[str, object]
_SECONDS_UNWATCHED = 0.05
# Replies of more numbers than this are written in a thread, so that the event loop goes on.
_LARGE = 50_000
# What a request of a batch adds to its priority: it waits for all of clients, which may order theirs below this.
_BEHIND = 2**31
# When to ask again for a model that is being loaded.
_SECONDS_TO_ASK_AGAIN = 5.0
# Texts of more characters, or lists of more ids, are tokenised and decoded in a thread.
_LONG = 200_000


class Call:
    """One request: the server's engines and the HTTP request; then the chosen engine, and its latest answers.

    started: when the body was there, by `time.perf_counter`; replies count their time from here. load_seconds: how much of
    it was spent on waiting for the model. held: the model that it keeps in memory.
    `scope["state"]["behind"]` marks a request of a batch, which waits for those of clients.
    """

    __slots__ = ("answered", "engines", "held", "http", "load_seconds", "started")

    answered: Sequence[Answer]

    def __init__(self, engines: Engines, http: HttpRequest) -> None:
        self.engines = engines
        self.http = http
        self.held: Served | None = None
        self.load_seconds = 0.0
        self.started = time.perf_counter()

    @property
    def settings(self) -> ServerSettings:
        """The settings of the server."""
        return self.engines.settings

    @property
    def path_params(self) -> Mapping[str, str]:
        """The parameters of the path, by the names in the route's path."""
        return self.http.path_params

    def speak(self, shape: Shape) -> None:
        """From here on, errors of this request have that shape."""
        self.http.state.error_shape = shape

    @property
    def engine(self) -> PoolingEngine:
        """The chosen engine."""
        assert self.held is not None, "Call.use comes first"
        return self.held.engine

    async def use(self, model: str | None, any_name: bool = False) -> PoolingEngine:
        """Choose the engine of that name; without a name, the first. It stays in memory until the request ends.

        any_name: a single model answers to every name. A model on demand is loaded if it is not in memory.

        Raises:
            UnknownModel: no such name. Unavailable: it cannot be loaded, or not soon. Disconnected: the client is gone.
        """
        name = await self.engines.find(model, any_name)
        if self.held is None or self.held.name != name:
            # Whoever held one model while it waits for another would keep the memory that this one needs.
            self.release()
            held = self.engines.use(name)
            self.held = held if isinstance(held, Served) else await self._loaded(name, held)
        return self.engine

    def release(self) -> None:
        """The request needs its engine no more."""
        if self.held is not None:
            held, self.held = self.held, None
            held.release()

    async def _loaded(self, name: str, loading: asyncio.Future[Served]) -> Served:
        """The model that is being loaded. The load goes on if nobody waits for it."""
        if loading.done():
            return loading.result()
        # Failures too are counted and logged by their model.
        self.http.scope["state"]["model"] = name
        seconds, began = self.settings.load_timeout, time.perf_counter()
        gone = asyncio.ensure_future(self._gone())
        held: Served | None = None
        try:
            await asyncio.wait((loading, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                held = loading.result()
                self.load_seconds = time.perf_counter() - began
                return held
            if gone.done():
                raise Disconnected
            raise Unavailable(
                f"The model `{name}` was not loaded within {seconds:g} seconds (--load-timeout); ask again soon.",
                _SECONDS_TO_ASK_AGAIN,
            )
        finally:
            gone.cancel()
            if held is None and not loading.cancel() and loading.exception() is None:
                loading.result().release()

    async def _gone(self) -> None:
        """Until the client hangs up."""
        while (await self.http.receive())["type"] != "http.disconnect":
            # A body that nobody reads.
            pass

    def parse(self, body: JsonObject, fields: type[FieldsT]) -> FieldsT:
        """The fields of a body.

        Raises:
            ValidationError: a field is missing, or has a wrong type or value. InvalidRequest: more items than one request
                may hold.
        """
        started = time.perf_counter()
        parsed = fields.model_validate(body, context=self.engines)
        self.engines.metrics.parse_seconds.observe(time.perf_counter() - started)
        return parsed

    async def answers(
        self, requests: Sequence[Request], location: Callable[[int], str] = "input[{}]".format
    ) -> list[Answer]:
        """Answers of the chosen engine in order; when the client hangs up, its prompts leave the queue.

        location: the path of a request's prompt in the body, for messages.

        Raises:
            Overloaded: the queue is full. Refused: too long a wait. Disconnected: the client is gone. Otherwise the error
            of the first prompt that has one.
        """
        held, state = self.held, self.http.scope["state"]
        assert held is not None, "Call.use comes first"
        behind = state.get("behind", False)
        if behind:
            requests = [replace(request, priority=request.priority + _BEHIND) for request in requests]
        # Failures too are counted and logged by their model.
        state["model"] = held.engine.facts.name
        submitted = time.perf_counter()
        futures = [request.future for request in requests]
        with held.accepted(requests, behind):
            try:
                answers = await self._answered(futures, watched=not behind)
            except InvalidRequest as error:
                raise _located(error, futures, location) from None
        self.answered = answers
        self._count(requests, answers)
        if "steps" in state:  # the request is traced
            tracing.note(state["steps"], submitted, answers)
        return answers

    async def each(
        self, requests: Sequence[Request], location: Callable[[int], str] = "input[{}]".format
    ) -> list[Answer | InvalidRequest]:
        """As `answers`, but what is wrong with a prompt stands in its place, unless that is so with all of them.

        Raises:
            as `answers`; of the prompts' own errors the first, where no prompt has an answer.
        """
        try:
            return [*await self.answers(requests, location)]
        except InvalidRequest:
            futures = [request.future for request in requests]
            if not all(future.done() and not future.cancelled() for future in futures):
                # None was accepted.
                raise
            results = [_answer_or_error(future) for future in futures]
            answers = [one for one in results if isinstance(one, Answer)]
            if not answers:
                raise
        self.answered = answers
        self._count(requests, answers)
        return results

    async def _answered(self, futures: Sequence[Future[Answer]], watched: bool) -> list[Answer]:
        """Answers in order. watched: whether there is a client that may leave, and a limit of time."""
        loop = asyncio.get_running_loop()
        answering = all_results(futures)
        watches: list[asyncio.Task[None]] = []
        # A server that is stopped gives up on these.
        unanswered: set[asyncio.Future[list[Answer]]] = self.http.scope["state"].get("unanswered", set())
        unanswered.add(answering)
        # Most answers are there before it pays to watch whether the client still waits for them.
        later = loop.call_later(
            _SECONDS_UNWATCHED, lambda: watches.append(loop.create_task(self._watch(answering))) if watched else None
        )
        try:
            return await answering
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        finally:
            unanswered.discard(answering)
            later.cancel()
            for watch in watches:
                watch.cancel()

    async def _watch(self, answering: asyncio.Future[list[Answer]]) -> None:
        """Give up on answers when the client is gone, or the time is over."""
        seconds = self.settings.request_timeout_seconds
        error: Exception = Disconnected()
        try:
            async with asyncio.timeout(seconds - _SECONDS_UNWATCHED):
                # After the body, the next thing that a client can send is that it is gone.
                await self.http.receive()
        except TimeoutError:
            error = Refused(f"There was no answer within {seconds:g} seconds (--request-timeout-seconds).", 504)
        if not answering.done():
            answering.set_exception(error)

    def _count(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        tokens = sum(len(answer.tokens) for answer in answers)
        truncated = sum(answer.tokens.truncated for answer in answers)
        task = requests[0].task if requests else "none"
        name = self.engine.facts.name
        self.engines.metrics.answered(route_of(self.http.scope), name, task, len(answers), tokens, truncated)
        state = self.http.scope["state"]
        # Some routes submit several times for one HTTP request.
        state["items"] = state.get("items", 0) + len(answers)
        state["tokens"] = state.get("tokens", 0) + tokens
        if truncated:
            state["truncated"] = state.get("truncated", 0) + truncated

    def note_items(self, items: int) -> None:
        """Name the model and the count of items in the log, where no model runs."""
        state = self.http.scope["state"]
        state["model"], state["items"] = self.engine.facts.name, items

    def reply_id(self, prefix: str, body_id: str | None = None) -> str:
        """`prefix-` and the id of the header or of the body, else 16 random hex digits."""
        return f"{prefix}-{getattr(self.http.state, 'given_id', None) or body_id or secrets.token_hex(8)}"

    def list_head(self, prefix: str, body_id: str | None) -> dict[str, object]:
        """The first fields of vLLM's and OpenAI's lists: id, object, created, model."""
        return {
            "id": self.reply_id(prefix, body_id),
            "object": "list",
            "created": int(time.time()),
            "model": self.engine.facts.name,
        }

    async def write(
        self,
        render: Callable[[], bytes | Response],
        answers: Sequence[Answer],
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """The reply that `render` writes of these answers: JSON, or a response of another kind.

        headers: further ones. Inputs that were cut are counted in one too.
        """
        started = time.perf_counter()
        large = sum(answer.array.size for answer in answers) > _LARGE
        body = await asyncio.to_thread(render) if large else render()
        self.engines.metrics.serialize_seconds.observe(time.perf_counter() - started)
        response = body if isinstance(body, Response) else Response(body, media_type="application/json")
        truncated = sum(answer.tokens.truncated for answer in answers)
        if truncated:
            response.headers["X-Poolhouse-Truncated"] = str(truncated)
        response.headers.update(headers or {})
        return response

    async def compute(self, render: Callable[[], bytes], size: int | None) -> Response:
        """JSON that `render` writes without running a model.

        size: the characters, or tokens, that it reads; None where that is unknown.
        """
        in_thread = size is None or size > _LONG
        return Response(await asyncio.to_thread(render) if in_thread else render(), media_type="application/json")


def as_json(value: object) -> Response:
    """A small reply."""
    return Response(dumps(value), media_type="application/json")


def _located(
    error: InvalidRequest, futures: Sequence[Future[Answer]], location: Callable[[int], str]
) -> InvalidRequest:
    """The error with the path of its prompt, where there are several and not all are refused alike."""
    if len(futures) < 2 or (_message(futures[0]) == _message(futures[-1]) and not isinstance(error, InputTooLong)):
        return error
    return with_path(error, futures, location)


def _answer_or_error(future: Future[Answer]) -> Answer | InvalidRequest:
    error = future.exception()
    if isinstance(error, InvalidRequest):
        return error
    return future.result()


def _message(future: Future[Answer]) -> str | None:
    failed = future.done() and not future.cancelled() and future.exception() is not None
    return str(future.exception()) if failed else None
