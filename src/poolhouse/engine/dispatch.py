"""Dispatch: which replica gets which request, and what becomes of the requests of one that died.

    submit ─► shares ─► replica 0  ─► answered ─► future
       │         └────► replica 1 ─┐
       └► waiting (none is up)     └► lost ─► again, a few at a time ─► another replica ─► lost ─► error

Requests go to a replica's own queue at once, so that priorities and fair turns hold there; nothing is held back here. Each
goes to the replica with the least to do, by an estimate of its tokens.

A request whose replica died may be what killed it. So it is tried once more, and those that are tried again are few at a
time: one that kills again takes no more than these along, and is not given to a third.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count

from poolhouse.engine.observing import BatchRun, Guarded
from poolhouse.engine.queue import SMALLEST_SHARE
from poolhouse.engine.replica import Replica
from poolhouse.engine.request import Answer, Request, fail, start
from poolhouse.errors import EngineError
from poolhouse.inputs.prompts import images_of

# Requests that are tried again at a time.
_AGAIN_AT_ONCE = 8
# Estimates: characters of a token, tokens of a conversation that is not rendered yet, of a picture.
_CHARACTERS_PER_TOKEN, _TOKENS_PER_CONVERSATION, _TOKENS_PER_PICTURE = 4, 64, 512


@dataclass(slots=True, eq=False)
class _Sent:
    """A request that has no answer yet. cost: estimated tokens. tries: replicas that got it. replica: who has it now."""

    request: Request
    caller: int | None
    cost: int
    tries: int = 0
    replica: Replica | None = None


class Dispatch:
    """The requests of all replicas; a `Listener` of these. observer: who is told of their work."""

    def __init__(self) -> None:
        self.observer: Guarded | None = None
        self._lock = threading.RLock()
        self._empty = threading.Condition(self._lock)
        self._numbers = count()
        self._sent: dict[int, _Sent] = {}
        self._up: list[Replica] = []
        # Those that wait for any replica to be up, and for their second try.
        self._waiting: list[int] = []
        self._again: deque[int] = deque()
        self._tried_again: set[int] = set()
        self._refusal: EngineError | None = None

    @property
    def up(self) -> tuple[Replica, ...]:
        """The replicas that get requests, the one with the least to do first."""
        with self._lock:
            return tuple(sorted(self._up, key=lambda replica: replica.load))

    @property
    def pending(self) -> int:
        """How many accepted requests have neither answer nor error yet."""
        return len(self._sent)

    def add(self, replica: Replica) -> None:
        """Let it have requests from now on."""
        with self._lock:
            self._up.append(replica)
            waiting, self._waiting = self._waiting, []
            self._share_out(waiting)
        self._try_again()

    def remove(self, replica: Replica) -> None:
        """Give it no more requests; it answers those that it has."""
        with self._lock:
            if replica in self._up:
                self._up.remove(replica)

    def submit(self, requests: Sequence[Request], caller: int | None) -> None:
        """Share requests out; each future gets its answer or its error. caller: see `Replica.run`."""
        with self._lock:
            refusal = self._refusal
            if refusal is None:
                numbers = []
                for request in requests:
                    number = next(self._numbers)
                    self._sent[number] = _Sent(request, caller, _cost(request))
                    numbers.append(number)
                self._share_out(numbers)
        if refusal is not None:
            for request in requests:
                fail(request.future, refusal)
            return
        for number, request in zip(numbers, requests, strict=True):
            request.future.add_done_callback(partial(self._done, number))

    def wait(self, seconds: float) -> None:
        """Wait until every request has its answer, for at most so long."""
        with self._lock:
            self._empty.wait_for(lambda: not self._sent, seconds)

    def wait_for(self, replica: Replica, seconds: float, given_up: Callable[[], bool]) -> bool:
        """Wait until it has no request, for at most so long; whether that is so."""
        with self._lock:
            self._empty.wait_for(lambda: not replica.outstanding or given_up(), seconds)
            return not replica.outstanding

    def end(self, error: EngineError, refusal: EngineError, quietly: bool = False) -> None:
        """Fail all requests, and refuse those that come from now on. quietly: refuse alone."""
        with self._lock:
            self._refusal = self._refusal or refusal
            left = [] if quietly else [sent.request.future for sent in self._sent.values()]
        for future in left:
            fail(future, error)

    # --- What replicas tell ---

    def answered(self, numbers: Sequence[int], answers: Sequence[Answer]) -> None:
        for number, answer in zip(numbers, answers, strict=True):
            sent = self._sent.get(number)
            if sent is not None and start(sent.request.future):
                sent.request.future.set_result(answer)

    def failed(self, number: int, error: BaseException) -> None:
        sent = self._sent.get(number)
        if sent is not None:
            fail(sent.request.future, error)

    def tokenized(self, texts: int, seconds: float) -> None:
        if self.observer is not None:
            self.observer.tokenized(texts, seconds)

    def ran(self, batch: BatchRun) -> None:
        if self.observer is not None:
            self.observer.ran(batch)

    def lost(self, replica: Replica) -> None:
        """Try its requests once more, elsewhere; fail those that were tried twice."""
        with self._lock:
            self.remove(replica)
            if self._refusal is not None:
                return  # all is over, and who had to be told was told
            numbers = [number for number, sent in self._sent.items() if sent.replica is replica]
            twice: list[_Sent] = []
            for number in numbers:
                sent = self._sent[number]
                self._take_from(sent)
                self._tried_again.discard(number)
                if sent.tries < 2:
                    self._again.append(number)
                else:
                    twice.append(sent)
            self._empty.notify_all()
        for sent in twice:
            fail(
                sent.request.future,
                EngineError(
                    f"Two replicas died while they had this request; the last one {replica.ended}. It is not tried again."
                ),
            )
        self._try_again()

    # --- Within ---

    def _done(self, number: int, future: Future[Answer]) -> None:
        """A future has its result, whoever gave it."""
        with self._lock:
            sent = self._sent.pop(number, None)
            if sent is None:
                return
            replica = sent.replica
            self._take_from(sent)
            again = number in self._tried_again
            self._tried_again.discard(number)
            if not self._sent or (replica is not None and not replica.outstanding):
                self._empty.notify_all()
        if future.cancelled():
            start(future)  # so that who waits for it sees it
            if replica is not None:
                replica.cancel(number)
        if again:
            self._try_again()

    def _take_from(self, sent: _Sent) -> None:
        if sent.replica is not None:
            sent.replica.load -= sent.cost
            sent.replica.outstanding -= 1
            sent.replica = None

    def _share_out(self, numbers: Sequence[int]) -> None:
        """Give requests to the replicas with the least to do; a share that is not worth it is not divided."""
        if not self._up:
            self._waiting.extend(numbers)
            return
        known = [(number, sent) for number in numbers if (sent := self._sent.get(number)) is not None]
        several = max(1, sum(sent.cost for _, sent in known) // SMALLEST_SHARE)
        chosen = heapq.nsmallest(several, self._up, key=lambda replica: replica.load)
        # By load, then by place: replicas themselves are not compared.
        turns = [(replica.load, place) for place, replica in enumerate(chosen)]
        shares: dict[tuple[int, int | None], list[int]] = {}
        for number, sent in known:
            load, place = turns[0]
            heapq.heapreplace(turns, (load + sent.cost, place))
            replica = sent.replica = chosen[place]
            sent.tries += 1
            replica.load += sent.cost
            replica.outstanding += 1
            shares.setdefault((place, sent.caller), []).append(number)
        for (place, caller), own in shares.items():
            chosen[place].run(caller, own, [self._sent[number].request for number in own])

    def _try_again(self) -> None:
        """Give replicas what is to be tried again, a few at a time."""
        with self._lock:
            while self._again and self._up and len(self._tried_again) < _AGAIN_AT_ONCE:
                number = self._again.popleft()
                if number in self._sent:
                    self._tried_again.add(number)
                    self._share_out([number])


def _cost(request: Request) -> int:
    """About how many tokens there are to run."""
    prompt = request.prompt
    if prompt.ids is not None:
        return len(prompt.ids)
    if prompt.text is not None:
        tokens = 2 + (len(prompt.text) + len(prompt.pair or "")) // _CHARACTERS_PER_TOKEN
        return tokens if not prompt.images else tokens + _TOKENS_PER_PICTURE * len(prompt.images)
    return _TOKENS_PER_CONVERSATION + _TOKENS_PER_PICTURE * len(images_of(prompt))
