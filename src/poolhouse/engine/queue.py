"""Queue: requests that wait for a batch, and callers that take fair turns.

All requests of one `submit` call are one caller; they wait in a `CallerQueue`. Callers of one priority share a
`FairQueue`. It does start-time fair queueing (Goyal et al. 1996), with tokens as the measure of service:

    tag of a caller = virtual time when it began to wait + tokens that it was served since

    caller    tag    what it has left, oldest first
    C         500    [==]                               the smallest tag: the next batch begins with C's oldest request
    A         900    [====][===][======][==] ...        a huge submission: it goes on, but takes turns
    B        1100    [===][===]
             ----
              850    virtual time: a new caller D begins here, neither before all others nor behind them

The virtual time advances by (tokens served / callers that wait): as far as each caller's tag would move if all were
served equally. So a small submission is served within a batch or two of its arrival, and a stream of small ones does not
stop a huge one, since each newcomer's tag is a later one. Within a caller the oldest request goes first.

A batch begins with one request. The others are the waiting requests nearest to it in length, because sequences of equal
length share one attention call: of all that waits where there is one caller, else of those whose turn is near.

Before these go those of its caller that begin with the same tokens (a reranker's documents behind one query), where the
model runs a common beginning once. Each counts by what is its own.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Generic, NamedTuple, TypeVar

from poolhouse.engine.request import Answer, Request, Timing, start
from poolhouse.packing.tokens import Ids, Tokens
from poolhouse.params import PoolingParams
from poolhouse.tasks import Task

# Tokens beside a batch's own among which its requests are chosen by length, while several callers wait.
_HORIZON_TOKENS = 8192
# What a batch may hold behind a beginning that its prompts share: so many times its tokens, since each batch runs it
# anew, and at most so many budgets.
_RESTS_PER_LEAD = 4
_BUDGETS_OF_RESTS = 2
# Tokens that are not worth a second worker, when all are idle.
SMALLEST_SHARE = 128


class FairQueue:
    """The callers of one priority that wait.

    tokens: how many wait.
    virtual_time: where new callers begin, in tokens. It is never behind the mean of the callers' tags: those that leave
    were served early, which those that stay must not pay for.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.virtual_time = 0.0
        self._sum_of_tags = 0.0  # of all waiting callers
        # A heap by tag, then by age.
        self._callers: list[tuple[float, int, CallerQueue]] = []
        self._ages = count()

    def __len__(self) -> int:
        """How many callers wait."""
        return len(self._callers)

    def __iter__(self) -> Iterator[WaitingRequest]:
        """All that wait, in no order."""
        for _, _, caller in self._callers:
            yield from caller.by_age

    @property
    def is_single(self) -> bool:
        """Whether one request waits alone."""
        return len(self._callers) == 1 and len(self._callers[0][2]) == 1

    def add(self, request: WaitingRequest) -> None:
        caller = request.queue
        if not caller:
            caller.tag = self.virtual_time
            self._sum_of_tags += caller.tag
            heappush(self._callers, (caller.tag, next(self._ages), caller))
        caller.add(request)
        self.tokens += request.cost

    def take(self, budget: int, workers: int = 1) -> list[WaitingRequest]:
        """The next batch, sorted by length; empty where all that was found is cancelled.

        workers: how many are free, which share evenly what begins alike.
        """
        callers = len(self._callers)
        found = self._among_all(budget) if callers > 1 else self._of_the_only_caller()
        self._sum_of_tags -= sum(caller.tag for _, caller in found.callers)
        batch, cancelled = list[WaitingRequest](), found.cancelled
        if found.first is not None:
            batch, met = found.batch(found.first, budget, workers)
            cancelled += met
        # One may be met by age and by length.
        for request in dict.fromkeys(cancelled):
            self._drop(request)
        for request in batch:
            self._remove(request)
            cost = request.cost_beside(found.first)
            request.queue.tag += cost
            self.virtual_time += cost / callers
        for age, caller in found.callers:
            if caller:
                heappush(self._callers, (caller.tag, age, caller))
                self._sum_of_tags += caller.tag
        if self._callers:
            self.virtual_time = max(self.virtual_time, self._sum_of_tags / len(self._callers))
        batch.sort(key=cost_of)
        return batch

    def _of_the_only_caller(self) -> _Found:
        """All of the only caller that waits."""
        _, age, caller = heappop(self._callers)
        first = None
        while caller and first is None:
            oldest = next(iter(caller.by_age))
            if oldest.future.cancelled():
                self._drop(oldest)
            else:
                first = oldest
        return _Found([(age, caller)], caller.by_length, first, [])

    def _among_all(self, budget: int) -> _Found:
        """The requests whose turn is near: by their own tags, and as many tokens as fill a batch at least.

        A request's tag is that of its caller after all that is older in it.
        """
        near = self._callers[0][0] + budget / 2
        callers: list[tuple[int, CallerQueue]] = []
        rest: dict[int, Iterator[WaitingRequest]] = {}
        # The callers again, by the tag of the next request of each that was not looked at.
        turns: list[tuple[float, int, CallerQueue]] = []
        candidates, first, cancelled, tokens = ByLength(), None, list[WaitingRequest](), 0
        while tokens < budget + _HORIZON_TOKENS:
            source = turns if turns and not (self._callers and self._callers[0] < turns[0]) else self._callers
            if not source or (tokens >= budget and source[0][0] > near):
                break
            tag, age, caller = heappop(source)
            if source is not turns:
                callers.append((age, caller))
                rest[age] = iter(caller.by_age)
            request = next(rest[age], None)
            if request is None:
                continue
            if request.future.cancelled():
                cancelled.append(request)
            else:
                candidates.add(request)
                first = first or request
                tokens += request.cost
                tag += request.cost
            heappush(turns, (tag, age, caller))
        return _Found(callers, candidates, first, cancelled)

    def _drop(self, request: WaitingRequest) -> None:
        """Take out what was cancelled."""
        self._remove(request)
        start(request.future)

    def _remove(self, request: WaitingRequest) -> None:
        request.queue.remove(request)
        self.tokens -= request.cost


class _Found(NamedTuple):
    """What a batch is chosen from.

    callers: taken from the heap, with their ages. first: the request that the batch begins with, if there is any.
    cancelled: requests that leave the queue.
    """

    callers: list[tuple[int, CallerQueue]]
    candidates: ByLength
    first: WaitingRequest | None
    cancelled: list[WaitingRequest]

    def batch(
        self, first: WaitingRequest, budget: int, workers: int
    ) -> tuple[list[WaitingRequest], list[WaitingRequest]]:
        """What runs with the first, itself included, and cancelled requests that were met."""
        lead, room = first.lead, budget - first.cost
        alike = None if lead is None else first.queue.by_lead.get(lead)
        if lead is None or alike is None:
            others, cancelled = self.candidates.nearest(first, room)
            return [first, *others], cancelled
        own = first.cost - lead.length
        rests = max(budget - lead.length, min(_RESTS_PER_LEAD * lead.length, _BUDGETS_OF_RESTS * budget))
        if workers > 1:
            rests = min(rests, max(SMALLEST_SHARE, -(-(alike.tokens - alike.count * lead.length) // workers)))
        led, cancelled = alike.nearest(first, rests - own, lead.length)
        if 1 + len(led) + len(cancelled) < alike.count:
            return [first, *led], cancelled
        met = {*led, *cancelled}
        room -= sum(request.cost - lead.length for request in led)
        others, further = self.candidates.nearest(first, room, met=met)
        return [first, *led, *others], cancelled + further


class Lead(NamedTuple):
    """Tokens that several waiting prompts begin with: a hash of them, and how many."""

    key: int
    length: int


class CallerQueue:
    """What waits of the requests of one `submit` call that have one priority; lower priorities go first.

    tag: where it stands in the virtual time of its priority, in tokens. by_lead: those that begin alike, by length.
    """

    __slots__ = ("by_age", "by_lead", "by_length", "priority", "submitted", "tag")

    def __init__(self, priority: int = 0, submitted: float = 0.0) -> None:
        self.priority = priority
        self.submitted = submitted
        self.tag = 0.0
        self.by_length = ByLength()
        self.by_lead: dict[Lead, ByLength] = {}
        # Oldest first. An OrderedDict gives up its first entry without a search.
        self.by_age: OrderedDict[WaitingRequest, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.by_age)

    def add(self, request: WaitingRequest) -> None:
        self.by_age[request] = None
        self.by_length.add(request)
        if request.lead is not None:
            self.by_lead.setdefault(request.lead, ByLength()).add(request)

    def remove(self, request: WaitingRequest) -> None:
        del self.by_age[request]
        self.by_length.remove(request)
        if request.lead is not None:
            alike = self.by_lead[request.lead]
            alike.remove(request)
            if not alike.count:
                del self.by_lead[request.lead]


class Caller:
    """Who submits several times and takes one turn: its queues, by priority. number: which one it is, of this process."""

    __slots__ = ("number", "queues")
    _numbers = count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.queues: dict[int, CallerQueue] = {}

    def submitting(self, priorities: Iterable[int]) -> dict[int, CallerQueue]:
        """Its queues for what it submits now."""
        now = time.perf_counter()
        for priority in priorities:
            self.queues.setdefault(priority, CallerQueue(priority)).submitted = now
        return self.queues


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


@dataclass(slots=True, eq=False)
class WaitingRequest:
    """A tokenised request that waits for its batch.

    further: tasks answered from the same pass, with the parameters of each. spans: see `Request`.
    is_chunk: whether it is a piece of a longer prompt. route: see `Routes`. queue: that of its caller.
    lead: what it begins with like others of its caller, where a batch may hold that once.
    length: its tokens. cost: what it counts in a budget, its tokens and the patches that the tower runs over.
    """

    tokens: Tokens
    task: Task
    params: PoolingParams
    future: Future[Answer]
    adapter: str | None = None
    spans: Ids | None = None
    is_chunk: bool = False
    further: tuple[tuple[Task, PoolingParams], ...] = ()
    route: str | None = None
    arrival: Arrival = Arrival()
    queue: CallerQueue = field(default_factory=CallerQueue)
    lead: Lead | None = None
    length: int = field(init=False)
    cost: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = self.cost = len(self.tokens)
        if self.tokens.pictures is not None:
            self.cost += self.tokens.pictures.patches

    def cost_beside(self, first: WaitingRequest | None) -> int:
        """What it counts in a batch that begins with this one."""
        if self.lead is None or first is None or first is self:
            return self.cost
        return self.cost - self.lead.length * (self.lead == first.lead and self.queue is first.queue)


def cost_of(request: WaitingRequest) -> int:
    return request.cost


class ByLength:
    """Waiting requests by their length, oldest first within one; adding and removing cost the same however many wait.

    Of prompts with pictures the cost stands for the length. count, tokens: of all that wait.
    """

    __slots__ = ("_by_length", "_lengths", "count", "tokens")

    def __init__(self) -> None:
        self.count = self.tokens = 0
        self._lengths: list[int] = []
        self._by_length: dict[int, OrderedDict[WaitingRequest, None]] = {}

    def add(self, request: WaitingRequest) -> None:
        same = self._by_length.get(request.cost)
        if same is None:
            insort(self._lengths, request.cost)
            same = self._by_length[request.cost] = OrderedDict()
        same[request] = None
        self.count += 1
        self.tokens += request.cost

    def remove(self, request: WaitingRequest) -> None:
        same = self._by_length[request.cost]
        del same[request]
        self.count -= 1
        self.tokens -= request.cost
        if not same:
            del self._by_length[request.cost]
            del self._lengths[bisect_left(self._lengths, request.cost)]

    def nearest(
        self,
        first: WaitingRequest,
        room: int,
        shared: int = 0,
        met: Collection[WaitingRequest] = (),
    ) -> tuple[list[WaitingRequest], list[WaitingRequest]]:
        """Those nearest to `first` in length that have room beside it; and cancelled ones met on the way.

        Of two lengths equally near, the longer goes first. shared: tokens of each that are not counted. met: requests to
        pass by.
        """
        lengths, batch, cancelled = self._lengths, list[WaitingRequest](), list[WaitingRequest]()
        high = bisect_left(lengths, first.cost)
        low, room = high - 1, room + shared
        while True:
            longer = high < len(lengths) and lengths[high] <= room
            shorter = low >= 0 and lengths[low] <= room
            if longer and shorter:
                longer = lengths[high] - first.cost <= first.cost - lengths[low]
            if longer:
                length, high = lengths[high], high + 1
            elif shorter:
                length, low = lengths[low], low - 1
            else:
                return batch, cancelled
            for request in self._by_length[length]:
                if request is first or request in met:
                    continue
                if length > room:
                    break
                if request.future.cancelled():
                    cancelled.append(request)
                else:
                    batch.append(request)
                    room -= length - shared


Work = TypeVar("Work")


class TokenizerCall(NamedTuple):
    """Requests that share one call of the tokenizer; queues: of their `submit`, by priority."""

    requests: Sequence[Request]
    queues: Mapping[int, CallerQueue]


class Turns(Generic[Work]):
    """Work that waits for a thread: lower priorities first, and within one a late small submission soon.

    Each piece gets a number, the smallest goes next. The pieces of a submission are numbered two apart, from the count of
    those served so far: a newcomer goes before most of what a huge submission has left, and no piece is passed by those
    that come once its number is reached.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, int, Work]] = []
        self._served = 0
        self._ages = count()
        self._lock = threading.Lock()

    def add(self, pieces: Sequence[Work], priority: int) -> None:
        """Let the work of one submission wait."""
        with self._lock:
            for index, piece in enumerate(pieces):
                heappush(self._waiting, (priority, self._served + 2 * index, next(self._ages), piece))

    def next(self) -> Work | None:
        """What goes next; None where none waits."""
        with self._lock:
            if not self._waiting:
                return None
            self._served += 1
            return heappop(self._waiting)[-1]
