"""Scheduler: who goes next.

The oldest request always goes first, so nobody starves; the rest of its batch are the waiting requests nearest to it
in length, because sequences of equal length share one attention call.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from poolhouse.engine.request import Answer
from poolhouse.params import PoolingParams
from poolhouse.tasks import Task
from poolhouse.tokens import Ids, Tokens


@dataclass(slots=True, eq=False)
class Ready:
    """A tokenised request that waits for its batch.

    spans: see `Request`. part: whether it is a piece of a longer prompt.
    """

    tokens: Tokens
    task: Task
    params: PoolingParams
    future: Future[Answer]
    adapter: str | None = None
    spans: Ids | None = None
    part: bool = False
    length: int = field(init=False)
    taken: bool = False

    def __post_init__(self) -> None:
        self.length = len(self.tokens)


class Scheduler:
    """Waiting requests, and the next batch of at most `budget` tokens (one longer request goes alone)."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._by_age: deque[Ready] = deque()
        self._by_length: list[Ready] = []
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._by_length)

    def add(self, ready: Sequence[Ready]) -> bool:
        """Let requests wait; False when the scheduler is closed and took none."""
        with self._changed:
            if self._closed:
                return False
            self._by_age.extend(ready)
            self._by_length.extend(ready)
            self._by_length.sort(key=_length)
            self._changed.notify()
            return True

    def next(self, block: bool = True) -> list[Ready] | None:
        """The next batch, sorted by length.

        Waits for one when `block` is set, else returns an empty list; None once closed and empty.
        """
        with self._changed:
            while block and not self._by_length and not self._closed:
                self._changed.wait()
            if not self._by_length:
                return None if self._closed else []
            return self._take(self._oldest())

    def close(self) -> None:
        """Take no more; what waits is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def drop_all(self) -> list[Ready]:
        """Everything that waits, taken out."""
        with self._changed:
            dropped, self._by_length = self._by_length, []
            self._by_age.clear()
            return dropped

    def _oldest(self) -> Ready:
        while self._by_age[0].taken:
            self._by_age.popleft()
        return self._by_age.popleft()

    def _take(self, oldest: Ready) -> list[Ready]:
        waiting = self._by_length
        low = bisect_left(waiting, oldest.length, key=_length)
        while waiting[low] is not oldest:
            low += 1
        high, room = low + 1, self.budget - oldest.length
        while True:
            shorter = low > 0 and waiting[low - 1].length <= room
            longer = high < len(waiting) and waiting[high].length <= room
            if shorter and longer:
                longer = waiting[high].length - oldest.length <= oldest.length - waiting[low - 1].length
            if longer:
                room -= waiting[high].length
                high += 1
            elif shorter:
                low -= 1
                room -= waiting[low].length
            else:
                break
        batch = waiting[low:high]
        del waiting[low:high]
        for ready in batch:
            ready.taken = True
        return batch


def _length(ready: Ready) -> int:
    return ready.length
