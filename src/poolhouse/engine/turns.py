"""Turns: whose texts a tokenizer thread takes next."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from itertools import count

from poolhouse.engine.ready import Flow
from poolhouse.engine.request import Request

# Requests that share a tokenizer call, and the flows of their `submit`, by priority.
Part = tuple[Sequence[Request], Mapping[int, Flow]]


class Turns:
    """Parts of submissions that wait to be tokenised: lower priorities first, and within one a late small one soon.

    The parts of a submission stand two places apart, from the place that is served at the time: a newcomer goes before
    most of what a huge one has left, and no part is passed by those that come once its place is reached.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, int, Part]] = []
        self._served = 0
        self._ages = count()
        self._lock = threading.Lock()

    def add(self, parts: Sequence[Part]) -> None:
        """Let the parts of one submission wait."""
        with self._lock:
            for place, part in enumerate(parts):
                heappush(self._waiting, (min(part[1]), self._served + 2 * place, next(self._ages), part))

    def next(self) -> Part | None:
        """The part that goes next; None where none waits."""
        with self._lock:
            if not self._waiting:
                return None
            self._served += 1
            return heappop(self._waiting)[-1]
