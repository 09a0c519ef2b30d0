"""Observing: what an engine reports of its work, call by call and batch by batch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ParamSpec, Protocol

from poolhouse.engine.queue import Arrival

log = logging.getLogger("poolhouse")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One batch that was run.

    tokens, budget: how many it held, patches of pictures included, and how many it may hold; a single long prompt may
    exceed the budget. pictures: how many it showed, each counted once.
    waits: (seconds, sequences): how long requests waited for it, those together that arrived together.
    forward_seconds, pooling_seconds: the backbone's and the pipelines' time on the device.
    computed: those of `tokens` that ran; what prompts share in their beginnings runs once.
    """

    sequences: int
    tokens: int
    budget: int
    waits: tuple[tuple[float, int], ...]
    forward_seconds: float
    pooling_seconds: float
    pictures: int = 0
    computed: int = 0


class Observer(Protocol):
    """Is called for an engine's work, in its tokenizer threads, callers' threads and workers; must be quick."""

    def tokenized(self, texts: int, seconds: float) -> None:
        """One tokenizer call made ids of so many prompts."""
        ...

    def ran(self, batch: BatchRun) -> None:
        """One batch was answered."""
        ...


class Guarded:
    """An observer whose failures are logged, once, and go no further."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._failed = False

    def tokenized(self, texts: int, seconds: float) -> None:
        self._call(self.observer.tokenized, texts, seconds)

    def ran(self, batch: BatchRun) -> None:
        self._call(self.observer.ran, batch)

    def _call(self, method: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(*args, **kwargs)
        except BaseException as error:  # no request may suffer from being watched
            if not self._failed:
                self._failed = True
                log.error("The engine's observer failed; further failures are not logged: %s", error, exc_info=error)


def waits(arrivals: Iterable[Arrival], started: float) -> tuple[tuple[float, int], ...]:
    """How long requests waited for the batch that started then, by their common arrivals."""
    return tuple((arrival.waited(started), count) for arrival, count in Counter(arrivals).items())
