"""Scheduler: which requests run next, and which worker runs them.

Lower priorities go first, and a batch holds one priority only, so that what is urgent waits for nothing else. Within a
priority callers take fair turns: see `poolhouse.engine.queue`.

On a CPU several workers may run batches side by side, each on its share of the cores; one more worker has all cores.
With two cores:

    worker 0           core 1    [ batch of many texts ][ batch of many texts ]
    worker 1           core 2    [ batch of many texts    ][ batch ]
    all-core worker    both                                             [ one text ]

- Much waits and nothing runs: the one-core workers share it evenly. Two batches side by side are quicker than one on two
  cores, where each core waits for the slower one after every operation.
- Little waits (one request, or up to 128 tokens) and nothing runs: the all-core worker takes it. One text on two cores
  is answered sooner than on one.
- Something runs and another worker is free: the free one waits until as much waits as runs, for at most 20 ms or a
  quarter of the last batch. Callers that were just answered ask again within a moment; a worker that takes the first of
  them at once runs a handful of short texts, which is less efficient than a dozen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from poolhouse.engine.queue import SMALLEST_SHARE, FairQueue, WaitingRequest, cost_of

# Longest wait of a free worker for more to come, in seconds and as a share of the last batch.
_LONGEST_PAUSE = 0.02
_PAUSE_SHARE = 0.25


class Scheduler:
    """Waiting requests, and the next batch of at most `budget` tokens and patches of pictures (one larger request goes alone).

    workers: how many batches may run at a time. Methods name a worker by its number, and the all-core worker by None.
    """

    def __init__(self, budget: int, workers: int = 1) -> None:
        self.budget = budget
        self.workers = workers
        self._queues: dict[int, FairQueue] = {}
        self._lock = threading.Lock()
        self._workers = [_Worker(threading.Condition(self._lock)) for _ in range(workers)]
        # A worker that has no other beside it has all cores.
        self._all_core = self._workers[0] if workers == 1 else _Worker(threading.Condition(self._lock))
        # Who computes the own requests in the thread that submitted them.
        self._caller = _Worker(threading.Condition(self._lock))
        self._everyone = (
            [*self._workers, self._caller] if workers == 1 else [*self._workers, self._all_core, self._caller]
        )
        # Since when anything waits, and how long the last batch took.
        self._since = 0.0
        self._batch_seconds = 0.0
        # Whether what waits is what the last worker left for others.
        self._sharing = False
        self._closed = False

    def __len__(self) -> int:
        return sum(1 for queue in self._queues.values() for _ in queue)

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._closed

    def add(self, requests: Sequence[WaitingRequest]) -> bool:
        """Let requests wait; False when the scheduler is closed and took none."""
        with self._lock:
            if self._closed:
                return False
            if not self._queues:
                self._since = time.perf_counter()
            for request in requests:
                queue = self._queues.get(request.queue.priority)
                if queue is None:
                    queue = self._queues[request.queue.priority] = FairQueue()
                queue.add(request)
            self._wake()
            return True

    def begin_turn(self, tokens: int) -> bool:
        """Let the thread that calls this run a batch of its own, of so many tokens; False where that may not be.

        It may where nothing runs and nothing waits, so nobody is passed. What comes meanwhile goes to a worker.
        """
        with self._lock:
            if self._closed or self._queues or self._running:
                return False
            me = self._caller
            me.tokens, me.since, me.idle, me.thread = tokens, time.perf_counter(), False, threading.get_ident()
            return True

    def end_turn(self) -> None:
        """The batch of the thread that calls this is done; does nothing where it has none."""
        with self._lock:
            if self._caller.thread == threading.get_ident():
                self._caller.thread = None
                self._finish(self._caller)
                self._wake()

    def next(self, worker: int | None = 0, block: bool = True) -> list[WaitingRequest] | None:
        """The next batch for a worker, sorted by length; its last one is done.

        Waits for one when `block` is set, else returns an empty list; None once closed and empty.
        """
        me = self._worker(worker)
        with self._lock:
            self._finish(me)
            try:
                self._wake()
                while True:
                    if not self._queues:
                        if self._closed or not block:
                            return None if self._closed else []
                        me.changed.wait()
                    elif block and (pause := self._pause(me)) != 0:
                        me.changed.wait(pause)
                    elif batch := self._take(*self._share()):
                        me.tokens, me.since = sum(map(cost_of, batch)), time.perf_counter()
                        return batch
            finally:
                me.idle = False
                self._wake()

    def finished(self, worker: int | None = 0) -> None:
        """A worker's batch is done, and it will soon ask for the next.

        Called before its callers get their answers: they may ask again at once, and should find a free worker.
        """
        with self._lock:
            self._finish(self._worker(worker))

    def close(self) -> None:
        """Take no more; what waits is still handed out."""
        with self._lock:
            self._closed = True
            for worker in self._everyone:
                worker.changed.notify()

    def drop_all(self) -> list[WaitingRequest]:
        """Everything that waits, taken out."""
        with self._lock:
            dropped = [request for queue in self._queues.values() for request in queue]
            self._queues.clear()
            return dropped

    @property
    def _tokens(self) -> int:
        """How many wait."""
        return sum(queue.tokens for queue in self._queues.values())

    @property
    def _waits_little(self) -> bool:
        """Whether what waits is not worth being shared out."""
        if self._tokens <= min(self.budget, SMALLEST_SHARE):
            return True
        (queue, *others) = self._queues.values()
        return not others and queue.is_single

    @property
    def _running(self) -> list[_Worker]:
        return [worker for worker in self._everyone if worker.tokens]

    def _worker(self, number: int | None) -> _Worker:
        return self._all_core if number is None else self._workers[number]

    def _finish(self, worker: _Worker) -> None:
        if not worker.idle:
            now = time.perf_counter()
            if worker.tokens:
                self._batch_seconds = now - worker.since
            worker.tokens, worker.since, worker.idle = 0, now, True

    def _next_worker(self) -> _Worker | None:
        """Who takes what waits; None while all work."""
        running = self._running
        if not running and self._all_core.idle and self._waits_little:
            return self._all_core
        if len(running) == self.workers:
            return None
        return next((worker for worker in self._workers if worker.idle), None)

    def _wake(self) -> None:
        """Wake the worker that takes what waits."""
        if self._queues and (worker := self._next_worker()) is not None:
            worker.changed.notify()

    def _pause(self, me: _Worker) -> float | None:
        """How long an idle worker leaves what waits: seconds; None until it is woken; 0 to go on."""
        if self._closed:
            return 0
        if me is not self._next_worker():
            return None
        busy = [worker.tokens for worker in self._running]
        if not busy or self._sharing or self._tokens >= min(self.budget, sum(busy) / len(busy)):
            return 0
        longest = min(_LONGEST_PAUSE, self._batch_seconds * _PAUSE_SHARE)
        return max(0.0, max(self._since, me.since) + longest - time.perf_counter())

    def _share(self) -> tuple[int, int]:
        """How many tokens may be taken: those of a batch, or fewer where other workers are free to help; and how many are."""
        free = self.workers - len(self._running)
        self._sharing = free > 1 and not self._waits_little
        if not self._sharing:
            return self.budget, 1
        return min(self.budget, max(SMALLEST_SHARE, -(-self._tokens // free))), free

    def _take(self, budget: int, workers: int) -> list[WaitingRequest]:
        priority = min(self._queues)
        queue = self._queues[priority]
        batch = queue.take(budget, workers)
        if not queue:
            del self._queues[priority]
        return batch


@dataclass(slots=True, eq=False)
class _Worker:
    """Who runs batches. tokens: of its batch under way; since: when it took that, or became free.

    idle: whether it waits for a batch, or will in a moment. thread: of a caller, while it has its turn.
    """

    changed: threading.Condition
    tokens: int = 0
    since: float = 0.0
    idle: bool = True
    thread: int | None = None
