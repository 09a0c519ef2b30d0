"""Scheduler: who goes next.

Lower priorities go first, and a batch holds one priority only, so that what is urgent waits for nothing else. Within a
priority, flows (the requests of one `submit` call each) share the device by tokens: start-time fair queueing (Goyal et
al. 1996), with a virtual time that advances by tokens served per waiting flow, so that new flows cannot starve old ones.
A flow's oldest request goes first, so nobody starves within it either.

The rest of the batch are the waiting requests nearest in length to its first, because sequences of equal length share
one attention call: of the whole flow where only one waits, else of those whose turn is near.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from poolhouse.engine.ready import ByLength, Flow, Ready
from poolhouse.engine.request import start

# Tokens beside a batch's own among which its requests are chosen by length, while several flows wait.
_HORIZON_TOKENS = 8192
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
        self._takers = [_Taker(threading.Condition(self._lock)) for _ in range(lanes)]
        # Of lone work: several lanes have one more thread that takes batches, on all cores.
        self._wide = self._takers[0] if lanes == 1 else _Taker(threading.Condition(self._lock))
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
                        me.tokens, me.since = sum(map(_length, batch)), time.perf_counter()
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
            for taker in self._all_takers:
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
    def _all_takers(self) -> list[_Taker]:
        return self._takers if self.lanes == 1 else [*self._takers, self._wide]

    @property
    def _running(self) -> list[_Taker]:
        return [taker for taker in self._all_takers if taker.tokens]

    def _taker(self, lane: int | None) -> _Taker:
        return self._wide if lane is None else self._takers[lane]

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
        return next((lane for lane in self._takers if lane.idle), None)

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


class Level:
    """The waiting flows of one priority.

    tokens: how many wait.
    clock: its virtual time in tokens, where new flows begin. It advances by tokens per waiting flow, and is never behind
    the mean of the flows' tags: those that leave were served early, which those that stay must not pay for.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.clock = 0.0
        self._tags = 0.0  # of all waiting flows together
        # A heap by tag, then by age.
        self._flows: list[tuple[float, int, Flow]] = []
        self._ages = count()

    def __len__(self) -> int:
        return len(self._flows)

    @property
    def lone(self) -> bool:
        """Whether one request waits alone."""
        return len(self._flows) == 1 and len(self._flows[0][2]) == 1

    @property
    def flows(self) -> list[Flow]:
        return [flow for _, _, flow in self._flows]

    def add(self, ready: Ready) -> None:
        flow = ready.flow
        if not flow:
            flow.tag = self.clock
            self._tags += flow.tag
            heappush(self._flows, (flow.tag, next(self._ages), flow))
        flow.add(ready)
        self.tokens += ready.length

    def take(self, budget: int) -> list[Ready]:
        """The next batch, sorted by length; empty where all that was found is cancelled."""
        flows = len(self._flows)
        touched, window, first, gone = self._window(budget) if flows > 1 else self._alone()
        self._tags -= sum(flow.tag for _, flow in touched)
        batch: list[Ready] = []
        if first is not None:
            batch, cancelled = window.nearest(first, budget)
            gone += cancelled
        for ready in gone:
            self._leave(ready)
        for ready in batch:
            self._remove(ready)
            ready.flow.tag += ready.length
            self.clock += ready.length / flows
        for age, flow in touched:
            if flow:
                heappush(self._flows, (flow.tag, age, flow))
                self._tags += flow.tag
        if self._flows:
            self.clock = max(self.clock, self._tags / len(self._flows))
        batch.sort(key=_length)
        return batch

    def _alone(self) -> Found:
        """All of the only flow that waits."""
        _, age, flow = heappop(self._flows)
        while flow:
            ready = next(iter(flow.by_age))
            if not ready.future.cancelled():
                return [(age, flow)], flow.by_length, ready, []
            self._leave(ready)
        return [(age, flow)], flow.by_length, None, []

    def _window(self, budget: int) -> Found:
        """The requests whose turn is near: by their own tags, and as many tokens as fill a batch at least.

        A request's tag is that of its flow after all that is older in it.
        """
        near = self._flows[0][0] + budget / 2
        touched: list[tuple[int, Flow]] = []
        rest: dict[int, Iterator[Ready]] = {}
        turns: list[tuple[float, int, Flow]] = []
        window, first, gone, tokens = ByLength(), None, list[Ready](), 0
        while tokens < budget + _HORIZON_TOKENS:
            source = turns if turns and not (self._flows and self._flows[0] < turns[0]) else self._flows
            if not source or (tokens >= budget and source[0][0] > near):
                break
            tag, age, flow = heappop(source)
            if source is not turns:
                touched.append((age, flow))
                rest[age] = iter(flow.by_age)
            ready = next(rest[age], None)
            if ready is None:
                continue
            if ready.future.cancelled():
                gone.append(ready)
            else:
                window.add(ready)
                first = first or ready
                tokens += ready.length
                tag += ready.length
            heappush(turns, (tag, age, flow))
        return touched, window, first, gone

    def _leave(self, ready: Ready) -> None:
        """Take out what was cancelled."""
        self._remove(ready)
        start(ready.future)

    def _remove(self, ready: Ready) -> None:
        ready.flow.remove(ready)
        self.tokens -= ready.length


# Flows taken from the heap with their ages, requests to choose from, the first of the batch, and cancelled ones.
Found = tuple[list[tuple[int, Flow]], ByLength, Ready | None, list[Ready]]


def _length(ready: Ready) -> int:
    return ready.length
