"""Served: a model under its name: its engine in memory, the requests that use it, and how many prompts may wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from poolhouse.engine.interface import EngineFacts, PoolingEngine
from poolhouse.engine.request import Request
from poolhouse.server.wire.errors import Overloaded

State = Literal["available", "loading", "loaded", "unloading", "failed"]


class Served:
    """An engine in memory under the name of its model. Belongs to one event loop.

    holds: requests that use it. last_used: when the last one began or ended, by `time.time`; None where there was none.
    released: called when the last one has ended.
    """

    def __init__(
        self,
        name: str,
        engine: PoolingEngine,
        admission: Admission,
        released: Callable[[Served], None] | None = None,
    ) -> None:
        self.name = name
        self.engine = engine
        self.admission = admission
        self.holds = 0
        self.last_used: float | None = None
        self._released = released
        self._singles = SingleRequests(engine)

    def hold(self) -> Served:
        """Count one more request; `release` ends it."""
        self.holds += 1
        self.last_used = time.time()
        return self

    def release(self) -> None:
        """One request has ended."""
        self.holds -= 1
        self.last_used = time.time()
        if self.holds == 0 and self._released is not None:
            self._released(self)

    def take_engine(self) -> PoolingEngine:
        """The engine, which nothing here refers to any more; the last call."""
        engine = self.engine
        del self.engine, self._singles
        return engine

    @contextmanager
    def accepted(self, requests: Sequence[Request], behind: bool = False) -> Iterator[None]:
        """Submit requests; they count as waiting until the block ends.

        behind: of a batch, which itself bounds how many wait: they take no place from those of clients.

        Raises:
            Overloaded: the queue is full.
        """
        if not behind:
            self.admission.enter(len(requests))
        try:
            if len(requests) == 1:
                self._singles.put(requests[0])
            else:
                submit(self.engine, requests)
            yield
        finally:
            if not behind:
                self.admission.leave(len(requests))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What lists show of a name that requests may use.

    model: the name that replies give. facts: None until the model was loaded for the first time.
    weight_bytes: of its files until it was loaded, then of its weights in memory; 0 where nobody knows.
    memory_bytes: what counts for the limit of memory while it is loaded; 0 where there is none.
    since: when it was there first. last_used, expires: by `time.time`; None: never. reason: why it failed.
    """

    name: str
    model: str
    facts: EngineFacts | None
    state: State
    weight_bytes: int
    waiting: int
    since: float
    memory_bytes: int = 0
    last_used: float | None = None
    expires: float | None = None
    reason: str | None = None


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
