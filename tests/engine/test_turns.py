"""Whose texts are tokenised next."""

from __future__ import annotations

from poolhouse.engine.queue import Flow, Part, Turns
from poolhouse.engine.request import Request
from poolhouse.inputs.prompts import Prompt


def parts(name: str, count: int, priority: int = 0) -> list[Part]:
    flows = {priority: Flow(priority)}
    return [([Request(Prompt(f"{name}{number}"), "embed")], flows) for number in range(count)]


def names(turns: Turns, count: int) -> list[str | None]:
    taken = [turns.next() for _ in range(count)]
    return [None if part is None else part[0][0].prompt.text for part in taken]


def test_parts_of_one_submission_keep_their_order() -> None:
    turns = Turns()
    turns.add(parts("a", 3))
    assert names(turns, 4) == ["a0", "a1", "a2", None]


def test_a_newcomer_does_not_wait_for_all_of_a_huge_one() -> None:
    turns = Turns()
    turns.add(parts("huge", 100))
    names(turns, 10)
    turns.add(parts("small", 2))
    assert names(turns, 3) == ["small0", "small1", "huge10"]


def test_lower_priorities_go_first() -> None:
    turns = Turns()
    turns.add(parts("late", 1, priority=3))
    turns.add(parts("soon", 1))
    assert names(turns, 2) == ["soon0", "late0"]


def test_a_huge_one_goes_on_while_newcomers_never_end() -> None:
    turns = Turns()
    turns.add(parts("huge", 100))
    taken: list[str | None] = []
    for _ in range(300):
        turns.add(parts("small", 1))
        taken += names(turns, 1)
    assert sum(str(name).startswith("huge") for name in taken) >= 50
