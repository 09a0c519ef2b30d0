"""Level: the waiting flows of one priority, which share the device by tokens.

Start-time fair queueing (Goyal et al. 1996), with a virtual time that advances by tokens served per waiting flow, so
that new flows cannot starve old ones. A flow's oldest request goes first, so nobody starves within it either.

The rest of the batch are the waiting requests nearest in length to its first, because sequences of equal length share
one attention call: of the whole flow where only one waits, else of those whose turn is near.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from poolhouse.engine.request import Answer, Request, Timing, start
from poolhouse.packing.tokens import Ids, Tokens
from poolhouse.params import PoolingParams
from poolhouse.tasks import Task


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """When requests were submitted (by `time.perf_counter`), and how long the tokenizer call took that they shared."""

    submitted: float = 0.0
    tokenize_seconds: float = 0.0

    def waited(self, started: float) -> float:
        """Seconds between submission and the start of the batch that were not the tokenizer's."""
        return max(0.0, started - self.submitted - self.tokenize_seconds)

    def timing(self, started: float, finished: float) -> Timing:
        return Timing(self.tokenize_seconds, self.waited(started), finished - started)


class Flow:
    """What waits of the requests of one `submit` call; priority: lower ones go first.

    tag: tokens that it was served, in the virtual time of its priority; see `poolhouse.engine.scheduler`.
    """

    __slots__ = ("by_age", "by_length", "priority", "submitted", "tag")

    def __init__(self, priority: int = 0, submitted: float = 0.0) -> None:
        self.priority = priority
        self.submitted = submitted
        self.tag = 0.0
        self.by_length = ByLength()
        # Oldest first. An OrderedDict gives up its first entry without a search.
        self.by_age: OrderedDict[Ready, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.by_age)

    def add(self, ready: Ready) -> None:
        self.by_age[ready] = None
        self.by_length.add(ready)

    def remove(self, ready: Ready) -> None:
        del self.by_age[ready]
        self.by_length.remove(ready)


class ByLength:
    """Waiting requests by their length, oldest first within one; adding and removing cost the same however many wait."""

    __slots__ = ("_lengths", "_of")

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._of: dict[int, OrderedDict[Ready, None]] = {}

    def add(self, ready: Ready) -> None:
        same = self._of.get(ready.length)
        if same is None:
            insort(self._lengths, ready.length)
            same = self._of[ready.length] = OrderedDict()
        same[ready] = None

    def remove(self, ready: Ready) -> None:
        same = self._of[ready.length]
        del same[ready]
        if not same:
            del self._of[ready.length]
            del self._lengths[bisect_left(self._lengths, ready.length)]

    def nearest(self, first: Ready, budget: int) -> tuple[list[Ready], list[Ready]]:
        """A batch of at most `budget` tokens: `first` and those nearest to it in length; and cancelled ones met on the way.

        Of two lengths equally near, the longer goes first. A first one of more than `budget` tokens goes alone.
        """
        lengths, batch, cancelled = self._lengths, [first], list[Ready]()
        high = bisect_left(lengths, first.length)
        low, room = high - 1, budget - first.length
        while True:
            longer = high < len(lengths) and lengths[high] <= room
            shorter = low >= 0 and lengths[low] <= room
            if longer and shorter:
                longer = lengths[high] - first.length <= first.length - lengths[low]
            if longer:
                length, high = lengths[high], high + 1
            elif shorter:
                length, low = lengths[low], low - 1
            else:
                return batch, cancelled
            for ready in self._of[length]:
                if ready is first:
                    continue
                if length > room:
                    break
                if ready.future.cancelled():
                    cancelled.append(ready)
                else:
                    batch.append(ready)
                    room -= length


@dataclass(slots=True, eq=False)
class Ready:
    """A tokenised request that waits for its batch.

    further: tasks answered from the same pass, with the parameters of each. spans: see `Request`.
    part: whether it is a piece of a longer prompt. route: see `Routes`.
    """

    tokens: Tokens
    task: Task
    params: PoolingParams
    future: Future[Answer]
    adapter: str | None = None
    spans: Ids | None = None
    part: bool = False
    further: tuple[tuple[Task, PoolingParams], ...] = ()
    route: str | None = None
    arrival: Arrival = Arrival()
    flow: Flow = field(default_factory=Flow)
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.tokens)


# Tokens beside a batch's own among which its requests are chosen by length, while several flows wait.
_HORIZON_TOKENS = 8192


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
        batch.sort(key=length_of)
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


def length_of(ready: Ready) -> int:
    return ready.length


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
