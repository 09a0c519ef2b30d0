"""Level: the waiting flows of one priority, which share the device by tokens.

Start-time fair queueing (Goyal et al. 1996), with a virtual time that advances by tokens served per waiting flow, so
that new flows cannot starve old ones. A flow's oldest request goes first, so nobody starves within it either.

The rest of the batch are the waiting requests nearest in length to its first, because sequences of equal length share
one attention call: of the whole flow where only one waits, else of those whose turn is near.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count

from poolhouse.engine.ready import ByLength, Flow, Ready
from poolhouse.engine.request import start

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
