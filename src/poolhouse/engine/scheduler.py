"""Scheduler: who goes next.

Lower priorities go first, and a batch holds one priority only, so that what is urgent waits for nothing else. Within a
priority, the requests of one `submit` call each are a flow, and flows take fair turns: see `level.py`.

Several lanes may take batches, each on its share of the cores. What comes while all are idle is shared out among them;
what is too little for that goes to a thread with all cores. While another lane works, one that is free waits a moment
for as much as the other has under way: callers that were just answered ask again, and a handful of short texts is less
efficient than a dozen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from poolhouse.engine.queue import Level, Ready, length_of

# Tokens that are not worth another lane, when all are idle.
_SMALLEST_SHARE = 128
# Longest wait of a free lane for more to come, in seconds and as a share of the last batch.
_LONGEST_PAUSE = 0.02
_PAUSE_SHARE = 0.25


class Scheduler:
    """Waiting requests, and the next batch of at most `budget` tokens (one longer request goes alone).

    lanes: how many may take batches, by their number.
    """

    def __init__(self, budget: int, lanes: int = 1) -> None:
        self.budget = budget
        self.lanes = lanes
        self._levels: dict[int, Level] = {}
        self._lock = threading.Lock()
        self._lanes = [_Taker(threading.Condition(self._lock)) for _ in range(lanes)]
        # Of lone work: several lanes have one more thread that takes batches, on all cores.
        self._wide = self._lanes[0] if lanes == 1 else _Taker(threading.Condition(self._lock))
        self._takers = self._lanes if lanes == 1 else [*self._lanes, self._wide]
        # Since when anything waits, and how long the last batch took.
        self._since = 0.0
        self._batch_seconds = 0.0
        # Whether what waits is what the last one left for others.
        self._sharing = False
        self._closed = False

    def __len__(self) -> int:
        return sum(len(flow) for level in self._levels.values() for flow in level.flows)

    def add(self, ready: Sequence[Ready]) -> bool:
        """Let requests wait; False when the scheduler is closed and took none."""
        with self._lock:
            if self._closed:
                return False
            if not self._levels:
                self._since = time.perf_counter()
            for request in ready:
                level = self._levels.get(request.flow.priority)
                if level is None:
                    level = self._levels[request.flow.priority] = Level()
                level.add(request)
            self._wake()
            return True

    def next(self, lane: int | None = 0, block: bool = True) -> list[Ready] | None:
        """The next batch for a lane, sorted by length; its last one is done. None for lane takes lone work.

        Waits for one when `block` is set, else returns an empty list; None once closed and empty.
        """
        me = self._taker(lane)
        with self._lock:
            self._finish(me)
            try:
                self._wake()
                while True:
                    if not self._levels:
                        if self._closed or not block:
                            return None if self._closed else []
                        me.changed.wait()
                    elif block and (pause := self._pause(me)) != 0:
                        me.changed.wait(pause)
                    elif batch := self._take(self._share()):
                        me.tokens, me.since = sum(map(length_of, batch)), time.perf_counter()
                        return batch
            finally:
                me.idle = False
                self._wake()

    def finished(self, lane: int | None = 0) -> None:
        """A lane's batch is done, and it will soon ask for the next: said before its callers hear, who may ask at once."""
        with self._lock:
            self._finish(self._taker(lane))

    def close(self) -> None:
        """Take no more; what waits is still handed out."""
        with self._lock:
            self._closed = True
            for taker in self._takers:
                taker.changed.notify()

    def drop_all(self) -> list[Ready]:
        """Everything that waits, taken out."""
        with self._lock:
            dropped = [ready for level in self._levels.values() for flow in level.flows for ready in flow.by_age]
            self._levels.clear()
            return dropped

    @property
    def _tokens(self) -> int:
        """How many wait."""
        return sum(level.tokens for level in self._levels.values())

    @property
    def _lone(self) -> bool:
        """Whether what waits is not worth being shared out."""
        if self._tokens <= min(self.budget, _SMALLEST_SHARE):
            return True
        (level, *others) = self._levels.values()
        return not others and level.lone

    @property
    def _running(self) -> list[_Taker]:
        return [taker for taker in self._takers if taker.tokens]

    def _taker(self, lane: int | None) -> _Taker:
        return self._wide if lane is None else self._lanes[lane]

    def _finish(self, taker: _Taker) -> None:
        if not taker.idle:
            now = time.perf_counter()
            if taker.tokens:
                self._batch_seconds = now - taker.since
            taker.tokens, taker.since, taker.idle = 0, now, True

    def _turn(self) -> _Taker | None:
        """Who takes what waits; None while all lanes work."""
        running = self._running
        if not running and self._wide.idle and self._lone:
            return self._wide
        if len(running) == self.lanes:
            return None
        return next((lane for lane in self._lanes if lane.idle), None)

    def _wake(self) -> None:
        """Wake whose turn it is, where something waits."""
        if self._levels and (taker := self._turn()) is not None:
            taker.changed.notify()

    def _pause(self, me: _Taker) -> float | None:
        """How long an idle one leaves what waits: seconds; None until it is woken; 0 to go on."""
        if self._closed:
            return 0
        if me is not self._turn():
            return None
        busy = [taker.tokens for taker in self._running]
        if not busy or self._sharing or self._tokens >= min(self.budget, sum(busy) / len(busy)):
            return 0
        longest = min(_LONGEST_PAUSE, self._batch_seconds * _PAUSE_SHARE)
        return max(0.0, max(self._since, me.since) + longest - time.perf_counter())

    def _share(self) -> int:
        """How many tokens may be taken: those of a batch, or fewer where other lanes are free to help."""
        free = self.lanes - len(self._running)
        self._sharing = free > 1 and not self._lone
        if not self._sharing:
            return self.budget
        return min(self.budget, max(_SMALLEST_SHARE, -(-self._tokens // free)))

    def _take(self, budget: int) -> list[Ready]:
        priority = min(self._levels)
        level = self._levels[priority]
        batch = level.take(budget)
        if not level:
            del self._levels[priority]
        return batch


@dataclass(slots=True, eq=False)
class _Taker:
    """Who takes batches. tokens: of its batch under way; since: when it took that, or became free.

    idle: whether it waits for a batch, or will in a moment.
    """

    changed: threading.Condition
    tokens: int = 0
    since: float = 0.0
    idle: bool = True
