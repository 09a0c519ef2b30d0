"""Ready: a tokenised request that waits for its batch, and the flow that it belongs to."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field

from poolhouse.engine.request import Answer, Timing
from poolhouse.params import PoolingParams
from poolhouse.tasks import Task
from poolhouse.tokens import Ids, Tokens


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
