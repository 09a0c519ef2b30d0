"""Serving: the engines of one server, and how a route gets answers from them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request as HttpRequest

from poolhouse.engine.request import Answer, Request
from poolhouse.engine.waiting import gather
from poolhouse.errors import InvalidRequest, UnknownModel
from poolhouse.precision import Calibration
from poolhouse.server.metrics import Metrics
from poolhouse.settings import ServerSettings
from poolhouse.tasks import Task


class Engine(Protocol):
    """What a server needs of an engine; `poolhouse.engine.engine.Engine` and `poolhouse.testing.FakeEngine` have it."""

    @property
    def name(self) -> str:
        """The name that replies give, whichever the request used."""
        ...

    @property
    def aliases(self) -> tuple[str, ...]: ...

    @property
    def tasks(self) -> tuple[Task, ...]: ...

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

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]: ...

    def close(self, drain_seconds: float = ...) -> None: ...


class Disconnected(Exception):
    """The client hung up; nobody waits for the answer."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Engines by the names that requests may use; the first is the default."""

    engines: Mapping[str, Engine]
    settings: ServerSettings
    metrics: Metrics

    @classmethod
    def of(cls, engines: Sequence[Engine], settings: ServerSettings, metrics: Metrics) -> Serving:
        """These engines by name and alias; of engines that share a name, the first has it."""
        names: dict[str, Engine] = {}
        for engine in engines:
            for name in (engine.name, *engine.aliases):
                names.setdefault(name, engine)
        return cls(names, settings, metrics)

    def engine(self, model: str | None) -> Engine:
        """The engine of that name; without a name, the first.

        Raises:
            UnknownModel: no such name.
        """
        if model is None or model == "":
            return next(iter(self.engines.values()))
        if model not in self.engines:
            raise UnknownModel(f"The model `{model}` does not exist.", None)
        return self.engines[model]

    async def answers(self, http: HttpRequest, engine: Engine, requests: Sequence[Request]) -> list[Answer]:
        """Answers in order; a client that hangs up takes its prompts out of the queue.

        Raises:
            Disconnected: the client is gone. Otherwise the error of the first prompt that has one.
        """
        futures = engine.submit(requests)
        answering = asyncio.ensure_future(gather(futures))
        # After the body, the next thing that a client can send is that it is gone.
        leaving = asyncio.ensure_future(http.receive())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise Disconnected
            return answering.result()
        except InvalidRequest as error:
            raise _located(error, futures) from None
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
                await asyncio.wait({answering})


def _located(error: InvalidRequest, futures: Sequence[Future[Answer]]) -> InvalidRequest:
    """The error with the place of its prompt, where there are several."""
    for index, future in enumerate(futures):
        if len(futures) > 1 and future.done() and not future.cancelled() and future.exception() is error:
            return type(error)(f"input[{index}]: {error}", error.parameter, error.value)
    return error


def reply_id(prefix: str, http: HttpRequest, given: str | None) -> str:
    """`prefix-` and the id that the header or the body gives, else 16 random hex digits."""
    return f"{prefix}-{http.headers.get('x-request-id') or given or secrets.token_hex(8)}"
