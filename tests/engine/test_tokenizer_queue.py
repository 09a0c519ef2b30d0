"""Whose texts are tokenised next."""

from __future__ import annotations

from poolhouse.engine.queue import CallerQueue, TokenizerCall, Turns
from poolhouse.engine.request import Request
from poolhouse.inputs.prompts import Prompt


def calls(name: str, count: int) -> list[TokenizerCall]:
    queues = {0: CallerQueue()}
    return [TokenizerCall([Request(Prompt(f"{name}{number}"), "embed")], queues) for number in range(count)]


def names(queue: Turns[TokenizerCall], count: int) -> list[str | None]:
    taken = [queue.next() for _ in range(count)]
    return [None if call is None else call.requests[0].prompt.text for call in taken]


def test_calls_of_one_submission_keep_their_order() -> None:
    queue = Turns[TokenizerCall]()
    queue.add(calls("a", 3), 0)
    assert names(queue, 4) == ["a0", "a1", "a2", None]


def test_a_newcomer_does_not_wait_for_all_of_a_huge_one() -> None:
    queue = Turns[TokenizerCall]()
    queue.add(calls("huge", 100), 0)
    names(queue, 10)
    queue.add(calls("small", 2), 0)
    assert names(queue, 3) == ["small0", "small1", "huge10"]


def test_lower_priorities_go_first() -> None:
    queue = Turns[TokenizerCall]()
    queue.add(calls("late", 1), 3)
    queue.add(calls("soon", 1), 0)
    assert names(queue, 2) == ["soon0", "late0"]


def test_a_huge_one_goes_on_while_newcomers_never_end() -> None:
    queue = Turns[TokenizerCall]()
    queue.add(calls("huge", 100), 0)
    taken: list[str | None] = []
    for _ in range(300):
        queue.add(calls("small", 1), 0)
        taken += names(queue, 1)
    assert sum(str(name).startswith("huge") for name in taken) >= 50
