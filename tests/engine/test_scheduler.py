"""The scheduler: oldest first, nearest in length with it, within the budget."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from poolhouse.engine.ready import Ready
from poolhouse.engine.scheduler import Scheduler
from poolhouse.params import PoolingParams
from poolhouse.tokens import Tokens


def ready(length: int) -> Ready:
    return Ready(Tokens(np.arange(length)), "embed", PoolingParams(), Future())


def lengths(batch: list[Ready] | None) -> list[int]:
    assert batch is not None
    return [item.length for item in batch]


def test_the_oldest_request_goes_first_with_its_nearest_in_length() -> None:
    scheduler = Scheduler(budget=30)
    scheduler.add([ready(n) for n in (10, 100, 9, 3, 12)])
    assert lengths(scheduler.next()) == [3, 9, 10]
    assert lengths(scheduler.next()) == [100]
    assert lengths(scheduler.next()) == [12]


def test_a_request_longer_than_the_budget_goes_alone() -> None:
    scheduler = Scheduler(budget=8)
    scheduler.add([ready(50), ready(2)])
    assert lengths(scheduler.next()) == [50]
    assert lengths(scheduler.next()) == [2]


def test_one_that_does_not_fit_does_not_stop_those_that_do() -> None:
    scheduler = Scheduler(budget=20)
    scheduler.add([ready(10), ready(11), ready(5), ready(5)])
    assert lengths(scheduler.next()) == [5, 5, 10]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 100))
def test_every_request_leaves_exactly_once_and_batches_keep_the_budget(sizes: list[int], budget: int) -> None:
    scheduler = Scheduler(budget)
    items = [ready(size) for size in sizes]
    scheduler.add(items)
    seen: list[Ready] = []
    while len(scheduler):
        oldest = next(item for item in items if not any(item is other for other in seen))
        batch = scheduler.next()
        assert batch is not None
        assert any(item is oldest for item in batch)
        assert lengths(batch) == sorted(lengths(batch))
        assert sum(lengths(batch)) <= budget or len(batch) == 1
        seen.extend(batch)
    assert len(seen) == len(items)
    assert {id(item) for item in seen} == {id(item) for item in items}


def test_next_waits_for_work_and_ends_when_closed() -> None:
    scheduler = Scheduler(budget=10)
    taken: list[list[Ready] | None] = []

    def work() -> None:
        while (batch := scheduler.next()) is not None:
            taken.append(batch)
        taken.append(None)

    thread = threading.Thread(target=work)
    thread.start()
    scheduler.add([ready(3)])
    scheduler.close()
    thread.join(10)
    assert not thread.is_alive()
    assert lengths(taken[0]) == [3]
    assert taken[1] is None
    assert scheduler.add([ready(1)]) is False


def test_next_without_blocking_answers_at_once() -> None:
    assert Scheduler(budget=10).next(block=False) == []
