"""Messages between processes: what is sent is what arrives."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from poolhouse.engine.channel import Channel, answers_of, columns_of, request_of, row_of
from poolhouse.engine.request import Answer, Request, Timing
from poolhouse.inputs.labels import Labels
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.tokens import Marks, Offsets, Pictures, Tokens
from poolhouse.params import PoolingParams


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = socket.socketpair()
    with one, other:
        yield Channel(one), Channel(other)


def sent(ends: tuple[Channel, Channel], message: object) -> Any:
    thread = threading.Thread(target=ends[0].send, args=(message,))
    thread.start()
    received = ends[1].receive()
    thread.join()
    return received


ARRAYS = [
    np.zeros(0, np.float32),
    np.arange(3, dtype=np.uint8),
    np.arange(6.0).reshape(2, 3).T,
    np.arange(20)[::3],
    np.random.default_rng(0).standard_normal((700, 900)),  # more than a socket's buffer
]


def test_arrays_arrive_aligned_and_may_be_written(ends: tuple[Channel, Channel]) -> None:
    received = sent(ends, [{"arrays": ARRAYS, "bytes": b"x" * 100_000}, "text"])
    assert received[1] == "text"
    assert received[0]["bytes"] == b"x" * 100_000
    for array, again in zip(ARRAYS, received[0]["arrays"], strict=True):
        np.testing.assert_array_equal(again, array)
        assert again.dtype == array.dtype
        assert again.flags.aligned
        again[...] = 1


def test_a_message_may_have_more_arrays_than_one_system_call_takes(ends: tuple[Channel, Channel]) -> None:
    arrays = [np.full(number % 70, number) for number in range(3000)]
    for array, again in zip(arrays, sent(ends, arrays), strict=True):
        np.testing.assert_array_equal(again, array)


def test_the_end_of_the_other_side_is_an_end(ends: tuple[Channel, Channel]) -> None:
    ends[0].socket.sendall(b"\0" * 5)  # amid a header
    ends[0].end()
    with pytest.raises(EOFError, match="gone"):
        ends[1].receive()
    with pytest.raises(OSError, match="pipe"):
        ends[1].send("x")


def test_what_cannot_be_pickled_sends_nothing(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        ends[0].send([1, lambda: None])
    assert sent(ends, "next") == "next"


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, arrays within them too."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Prompt | Request | Answer | Tokens | Offsets | Pictures | Marks):
        names = [field.name for field in fields(one) if field.name != "future"]
        return type(one) is type(other) and all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


REQUESTS = [
    Request(Prompt("the moon"), "embed"),
    Request(
        Prompt("a", prefix="query: ", pair="b", instruction="find", processor_options={"max_pixels": 3}),
        "token_embed", PoolingParams(dimensions=3), "query", False, "adapter", True, 7, True,
        np.array([[0, 2]]), "document", ("embed",), -3, (), True, Labels(("a", "b"), ("what", ""), 0.25, False, True),
    ),
    Request(Prompt(None, np.arange(5)), "classify"),
]  # fmt: skip


def test_requests_arrive_with_all_their_fields(ends: tuple[Channel, Channel]) -> None:
    assert {field.name for field in fields(Request)} == {
        *(
            "prompt",
            "task",
            "params",
            "prompt_name",
            "add_special_tokens",
            "adapter",
            "lower_case",
            "max_tokens",
            "offsets",
        ),
        *("spans", "input_type", "further", "priority", "pictures", "local_files", "labels", "future"),
    }
    again = [request_of(row) for row in sent(ends, [row_of(request) for request in REQUESTS])]
    assert all(map(same, REQUESTS, again))
    assert not any(request.future.done() for request in again)


def tokens(count: int, **more: Any) -> Tokens:
    return Tokens(np.arange(count), original_tokens=count + 3, **more)


OFFSETS = Offsets(np.zeros((3, 2), np.int64), np.arange(3), np.zeros(3, np.bool_))
MARKS = Marks(*(np.arange(6).reshape(3, 2) + n for n in range(3)), np.array([1]), 7, True, 0.25)
ANSWERS: dict[str, list[Answer]] = {
    "vectors": [Answer(np.full(4, n, np.float32), tokens(n + 1), timing=Timing(0.1, 0.2, n)) for n in range(70)],
    "rows per token": [
        Answer(np.ones((n, 4), np.float32) * n, tokens(n, types=np.zeros(n, np.int64))) for n in range(5)
    ],
    "vectors of several lengths": [Answer(np.ones(n, np.float32), tokens(2)) for n in (3, 1, 8)],
    "several shapes and types": [
        Answer(np.ones(3, np.float32), tokens(2), 2, {"classify": np.ones(2, np.float32)}),
        Answer(np.ones((3, 2), np.float32), tokens(3, types=np.ones(3, np.int64))),
        Answer(np.ones(3, np.float64), tokens(3, offsets=OFFSETS, attended=2, kept=np.array([True, False, True]))),
        Answer(np.ones((0, 3), np.float32), tokens(1, skip=1, original_is_estimate=True)),
        Answer(np.ones(3, np.float32), tokens(3, pictures=Pictures((), np.array([True, False, True])))),
        Answer(np.ones((1, 4), np.float32), tokens(6, marks=MARKS)),
    ],
    "one": [Answer(np.ones((4, 6), np.float32)[::2, 1:3], tokens(2))],
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_arrive_as_they_were(ends: tuple[Channel, Channel], kind: str) -> None:
    again = answers_of(sent(ends, columns_of(ANSWERS[kind])))
    assert all(map(same, ANSWERS[kind], again))


def test_answers_of_one_kind_are_few_arrays(ends: tuple[Channel, Channel]) -> None:
    arrays: list[pickle.PickleBuffer] = []
    pickle.dumps(columns_of(ANSWERS["vectors"]), 5, buffer_callback=arrays.append)
    assert len(arrays) == 2
