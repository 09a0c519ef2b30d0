"""The scheduler: priorities, fair shares, oldest first, nearest in length with it, within the budget."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import Future, wait

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolhouse.engine.queue import CallerQueue, WaitingRequest
from poolhouse.engine.scheduler import Scheduler
from poolhouse.packing.tokens import Picture, Pictures, Tokens
from poolhouse.params import PoolingParams

BUDGET = 2048


def ready(length: int, queue: CallerQueue | None = None) -> WaitingRequest:
    return WaitingRequest(
        Tokens(np.arange(length)), "embed", PoolingParams(), Future(), queue=CallerQueue() if queue is None else queue
    )


def submission(lengths: list[int], priority: int = 0) -> list[WaitingRequest]:
    queue = CallerQueue(priority)
    return [ready(length, queue) for length in lengths]


def mixed(count: int, seed: int = 0, priority: int = 0) -> list[WaitingRequest]:
    """One caller of texts of 4 to 400 tokens."""
    numbers = random.Random(seed)
    return submission([numbers.randint(4, 400) for _ in range(count)], priority)


def lengths(batch: list[WaitingRequest] | None) -> list[int]:
    assert batch is not None
    return [item.length for item in batch]


def taken(scheduler: Scheduler) -> list[WaitingRequest]:
    batch = scheduler.next(block=False)
    assert batch
    return batch


def batches_until(scheduler: Scheduler, wanted: list[WaitingRequest]) -> int:
    """How many batches go by until all of these were handed out."""
    missing, batches = set(wanted), 0
    while missing:
        missing -= set(taken(scheduler))
        batches += 1
    return batches


def test_the_oldest_request_goes_first_with_its_nearest_in_length() -> None:
    scheduler = Scheduler(budget=30)
    scheduler.add(submission([10, 100, 9, 3, 12]))
    assert lengths(scheduler.next()) == [3, 9, 10]
    assert lengths(scheduler.next()) == [100]
    assert lengths(scheduler.next()) == [12]


def test_a_request_longer_than_the_budget_goes_alone() -> None:
    scheduler = Scheduler(budget=8)
    scheduler.add(submission([50, 2]))
    assert lengths(scheduler.next()) == [50]
    assert lengths(scheduler.next()) == [2]


def page(patches: int, queue: CallerQueue) -> WaitingRequest:
    """A prompt that shows one picture, a quarter as many tokens as it has patches."""
    count = patches // 4
    picture = Picture(np.zeros((patches, 1), np.float32), np.zeros(count, np.int64), np.ones(count, bool), (patches, 1))
    tokens = Tokens(picture.ids, pictures=Pictures((picture,), picture.filled))
    return WaitingRequest(tokens, "embed", PoolingParams(), Future(), queue=queue)


def test_the_patches_of_pictures_count_in_the_budget() -> None:
    scheduler, queue = Scheduler(budget=2048), CallerQueue()
    scheduler.add([page(patches, queue) for patches in (5040, 800, 800, 800, 400)] + submission([300], 0))
    batches = [taken(scheduler) for _ in range(4)]
    assert [[(item.length, item.cost) for item in batch] for batch in batches] == [
        [(1260, 6300)],
        [(300, 300), (200, 1000)],
        [(200, 1000), (200, 1000)],
        [(100, 500)],
    ]
    assert len(scheduler) == 0


def test_one_that_does_not_fit_does_not_stop_those_that_do() -> None:
    scheduler = Scheduler(budget=20)
    scheduler.add(submission([10, 11, 5, 5]))
    assert lengths(scheduler.next()) == [5, 5, 10]


def test_one_caller_chooses_among_all_that_waits_however_far_back() -> None:
    scheduler = Scheduler(BUDGET)
    scheduler.add(submission([128, *[400] * 8000, *[128] * 15]))
    assert lengths(scheduler.next()) == [128] * 16


def test_several_callers_choose_among_those_whose_turn_is_near() -> None:
    scheduler = Scheduler(BUDGET)
    scheduler.add(submission([128, *[400] * 8000, *[128] * 15]))
    scheduler.add(submission([100]))
    assert lengths(scheduler.next()) == [100, 128, 400, 400, 400, 400]


def test_single_texts_are_grouped_by_length_too() -> None:
    scheduler = Scheduler(BUDGET)
    for length in [64, 400] * 20:
        scheduler.add([ready(length)])
    assert lengths(scheduler.next()) == [*[64] * 20, 400]


def test_single_texts_that_came_much_later_are_not_chosen_for_their_length() -> None:
    scheduler = Scheduler(BUDGET)
    for length in [64, 400] * 32:
        scheduler.add([ready(length)])
    # Of the first 10240 tokens.
    assert lengths(scheduler.next()) == [*[64] * 23, 400]


def test_lower_priorities_go_first_and_share_no_batch() -> None:
    scheduler = Scheduler(BUDGET)
    late, soon, now = submission([10] * 3, priority=5), submission([10] * 2), submission([10], priority=-1)
    scheduler.add([*late, *soon, *now])
    assert taken(scheduler) == now
    assert taken(scheduler) == soon
    scheduler.add(submission([7], priority=2))
    assert lengths(scheduler.next()) == [7]
    assert taken(scheduler) == late


@pytest.mark.parametrize("most", [40, 400])
@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("batches_before", [0, 1, 50])
def test_a_small_caller_that_comes_late_waits_for_a_batch_or_two(size: int, most: int, batches_before: int) -> None:
    """Also when its texts differ much in length, and those of the huge one are nearer to each of them."""
    for seed in range(5):
        scheduler = Scheduler(BUDGET)
        scheduler.add(mixed(2000))
        for _ in range(batches_before):
            taken(scheduler)
        numbers = random.Random(seed)
        small = submission([numbers.randint(4, most) for _ in range(size)])
        scheduler.add(small)
        more_than_its_share = sum(item.length for item in small) > BUDGET / 2
        assert batches_until(scheduler, small) <= (3 if more_than_its_share else 2)


def test_many_small_callers_do_not_wait_for_a_huge_one() -> None:
    scheduler = Scheduler(BUDGET)
    scheduler.add(mixed(8192))
    for _ in range(20):
        taken(scheduler)
    numbers = random.Random(1)
    small = [submission([numbers.randint(4, 40) for _ in range(3)]) for _ in range(500)]
    for caller in small:
        scheduler.add(caller)
    tokens = sum(item.length for caller in small for item in caller)
    # A batch or two for the huge one, and those that its nearest in length leave room in.
    assert batches_until(scheduler, [item for caller in small for item in caller]) <= tokens / BUDGET + 4


def test_equal_callers_get_equal_shares_whenever_they_are_asked() -> None:
    scheduler = Scheduler(BUDGET)
    callers = [mixed(3000, seed) for seed in range(4)]
    owner = {items[0].queue: number for number, items in enumerate(callers)}
    for items in callers:
        scheduler.add(items)
    shares: Counter[int] = Counter()
    for _ in range(200):
        for item in taken(scheduler):
            shares[owner[item.queue]] += item.length
        assert max(shares.values()) - min(shares[number] for number in range(4)) <= 3 * BUDGET
    assert sum(shares.values()) > 0.9 * 200 * BUDGET


def test_a_caller_that_waits_longest_is_no_favourite_later() -> None:
    """Who had the engine alone owes nothing, and is owed nothing."""
    scheduler = Scheduler(BUDGET)
    first, second = mixed(4000, 1), mixed(4000, 2)
    scheduler.add(first)
    for _ in range(100):
        taken(scheduler)
    scheduler.add(second)
    shares: Counter[bool] = Counter()
    for _ in range(100):
        for item in taken(scheduler):
            shares[item.queue is first[0].queue] += item.length
    assert abs(shares[True] - shares[False]) <= 3 * BUDGET


def test_a_huge_caller_keeps_its_share_while_small_ones_never_end() -> None:
    scheduler = Scheduler(BUDGET)
    huge = mixed(8192)
    scheduler.add(huge)
    numbers = random.Random(3)
    served = waiting = 0
    for _ in range(400):
        while waiting < 20:
            scheduler.add([ready(numbers.randint(100, 400))])
            waiting += 1
        for item in taken(scheduler):
            if item.queue is huge[0].queue:
                served += item.length
            else:
                waiting -= 1
    # Twenty-one callers wait at any time.
    assert served >= 0.5 * 400 * BUDGET / 21


@pytest.mark.parametrize("size", [1, 4, 12, 40])
def test_a_caller_whose_texts_come_in_parts_gets_no_more_than_its_share(size: int) -> None:
    scheduler = Scheduler(BUDGET)
    steady = mixed(4000, 5)
    scheduler.add(steady)
    slow, numbers = CallerQueue(), random.Random(6)
    shares: Counter[bool] = Counter()
    for _ in range(200):
        if not slow:
            scheduler.add([ready(numbers.randint(4, 400), slow) for _ in range(size)])
        for item in taken(scheduler):
            shares[item.queue is slow] += item.length
    assert shares[True] <= 1.1 * shares[False]


def test_who_shared_with_many_small_callers_is_not_behind_a_new_huge_one() -> None:
    scheduler = Scheduler(BUDGET)
    first, second = mixed(4000, 1), mixed(2000, 2)
    scheduler.add(first)
    for _ in range(100):
        scheduler.add([ready(20)])
        taken(scheduler)
    scheduler.add(second)
    shares: Counter[bool] = Counter()
    for _ in range(50):
        for item in taken(scheduler):
            shares[item.queue is first[0].queue] += item.length
    assert abs(shares[True] - shares[False]) <= 3 * BUDGET


def test_nobody_of_a_caller_starves_while_it_grows() -> None:
    scheduler = Scheduler(BUDGET)
    queue = CallerQueue()
    odd = ready(399, queue)
    scheduler.add([*(ready(20, queue) for _ in range(300)), odd])
    batches = [taken(scheduler)]
    while odd not in batches[-1]:
        assert len(batches) < 10
        scheduler.add([ready(20, queue) for _ in range(102)])
        batches.append(taken(scheduler))
    # The 300 before it fill three batches, and the oldest of those that came since go with them by length.
    assert len(batches) == 4


@pytest.mark.parametrize("callers", [1, 3])
def test_cancelled_requests_leave_and_take_no_room(callers: int) -> None:
    scheduler = Scheduler(budget=40)
    items = [item for _ in range(callers) for item in submission([10] * 6)]
    scheduler.add(items)
    for item in items[::2]:
        assert item.future.cancel()
    assert set(taken(scheduler)) <= set(items[1::2])
    while len(scheduler):
        batch = scheduler.next(block=False)
        assert batch is not None
        assert set(batch) <= set(items[1::2])
    # `wait` returns only when somebody has noticed that they are cancelled.
    done, waiting = wait([item.future for item in items[::2]], timeout=0)
    assert len(done) == len(items[::2])
    assert not waiting


def test_a_queue_of_cancelled_requests_is_empty() -> None:
    scheduler = Scheduler(budget=40)
    items = submission([10] * 3) + submission([10] * 3)
    scheduler.add(items)
    for item in items:
        item.future.cancel()
    assert scheduler.next(block=False) == []
    assert len(scheduler) == 0


SUBMISSIONS = st.lists(
    st.tuples(st.integers(-1, 1), st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(0, 3)),
    min_size=1,
    max_size=20,
)


@given(SUBMISSIONS, st.integers(1, 100), st.randoms(use_true_random=False))
def test_every_request_leaves_exactly_once_and_batches_keep_the_rules(
    submissions: list[tuple[int, list[int], int]], budget: int, numbers: random.Random
) -> None:
    """In parts, with batches in between and some cancelled: each is handed out once, or was cancelled."""
    scheduler = Scheduler(budget)
    waiting: list[WaitingRequest] = []
    everything: list[WaitingRequest] = []
    seen: list[WaitingRequest] = []

    def take() -> None:
        batch = scheduler.next(block=False)
        assert batch is not None
        assert lengths(batch) == sorted(lengths(batch))
        assert sum(lengths(batch)) <= budget or len(batch) == 1
        alive = [item for item in waiting if not item.future.cancelled()]
        assert bool(batch) == bool(alive)
        if batch:
            lowest = min(item.queue.priority for item in alive)
            assert {item.queue.priority for item in batch} == {lowest}
            # In one caller the oldest goes first.
            callers = {item.queue for item in alive if item.queue.priority == lowest}
            assert len(callers) > 1 or next(item for item in alive if item.queue.priority == lowest) in batch
        for item in batch:
            waiting.remove(item)
        seen.extend(batch)

    for priority, sizes, batches in submissions:
        items = submission(sizes, priority)
        everything += items
        middle = numbers.randint(0, len(items))
        for part in (items[:middle], items[middle:]):
            scheduler.add(part)
            waiting += part
            for _ in range(batches):
                take()
        numbers.choice(everything).future.cancel()
    while len(scheduler):
        take()
    left = {item for item in everything if item not in seen}
    assert len(seen) == len(set(seen))
    assert all(item.future.cancelled() for item in left)


def test_next_waits_for_work_and_ends_when_closed() -> None:
    scheduler = Scheduler(budget=10)
    batches: list[list[WaitingRequest] | None] = []

    def work() -> None:
        while (batch := scheduler.next()) is not None:
            batches.append(batch)
        batches.append(None)

    thread = threading.Thread(target=work)
    thread.start()
    scheduler.add([ready(3)])
    scheduler.close()
    thread.join(10)
    assert not thread.is_alive()
    assert lengths(batches[0]) == [3]
    assert batches[1] is None
    assert scheduler.add([ready(1)]) is False


def test_next_without_blocking_answers_at_once() -> None:
    assert Scheduler(budget=10).next(block=False) == []


def test_all_that_waits_can_be_dropped() -> None:
    scheduler = Scheduler(budget=10)
    items = [*submission([1, 2], priority=3), *submission([5])]
    scheduler.add(items)
    assert set(scheduler.drop_all()) == set(items)
    assert scheduler.next(block=False) == []
