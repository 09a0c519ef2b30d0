"""Golden exchanges: every dialect answers as recorded, in the shape that its own reference describes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.exchanges import DIALECTS, FOLDER, ask, client, differences, read
from tests.server.shapes import SHAPES, misfits

EXCHANGES = [
    pytest.param(dialect, exchange, id=f"{dialect}, {exchange['name']}")
    for dialect in DIALECTS
    for exchange in read(dialect)
]
TEI_HEADERS = {
    *("x-compute-type", "x-compute-time", "x-compute-characters", "x-compute-tokens"),
    *("x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"),
}


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with client() as http:
        yield http


@pytest.mark.parametrize(("dialect", "exchange"), EXCHANGES)
def test_a_request_is_answered_as_recorded(http: TestClient, dialect: str, exchange: dict[str, Any]) -> None:
    got = ask(http, exchange["request"])
    assert list(differences(exchange["response"], got)) == []
    shape = exchange["shape"]
    assert list(misfits(SHAPES[dialect][shape], got["body"])) == []
    assert (got["status"] == 200) == ("error" not in shape)
    if dialect == "tei" and not shape.startswith(("info", "tokens", "texts", "vertex")) and "error" not in shape:
        assert {name for name in got["headers"] if name.startswith("x-")} >= TEI_HEADERS


def test_every_shape_is_recorded_and_every_record_is_read() -> None:
    assert {dialect: {exchange["shape"] for exchange in read(dialect)} for dialect in DIALECTS} == {
        dialect: set(shapes) for dialect, shapes in SHAPES.items()
    }
    assert {path.stem for path in FOLDER.iterdir()} == set(DIALECTS)


@pytest.mark.parametrize(
    ("expected", "got", "words"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, ": fields ['b', 'a'], not ['a', 'b']"),
        ({"a": 1}, {"b": 1}, ": fields ['b'], not ['a']"),
        ([1.0], [1.01], "[0]: 1.01, not 1.0"),
        ([1], [1.0], "[0]: 1.0, not 1"),
        ([1], [1, 2], ": 2 items, not 1"),
        ({"a": [True]}, {"a": [1]}, ".a[0]: 1, not True"),
        ("A" * 40, "A" * 39 + "B", ": 'AAA"),
    ],
)
def test_a_reply_that_changed_is_seen(expected: Any, got: Any, words: str) -> None:
    (found,) = differences(expected, got)
    assert found.startswith(words)


def test_last_digits_may_differ() -> None:
    assert (
        list(
            differences(
                [0.1, "AACAPwAAAEAAAEBAAACAQAAAoEAAAMBAAADgQAAAAEE="],
                [0.1000001, "AQCAPwAAAEAAAEBAAACAQAAAoEAAAMBAAADgQAAAAEE="],
            )
        )
        == []
    )


@pytest.mark.parametrize(
    ("shape", "value", "words"),
    [
        ({"a": int}, {"b": 1}, "body: lacks ['a'], has ['b'] beside"),
        ({"a": int, "b?": int}, {"a": 1, "b": "x"}, "body.b: 'x' is no int"),
        ([float], [], "body: [] is no list of something"),
        ([[float]], [[1, True]], "body[0][1]: True is no float"),
        ({"a": {"list"}}, {"a": "lists"}, "body.a: 'lists' is none of"),
        ((int, None), "x", "body: 'x' is none of"),
        (None, 0, "body: 0 is not null"),
        ({"a": int}, [1], "body: [1] is no object"),
    ],
)
def test_a_shape_that_changed_is_seen(shape: Any, value: Any, words: str) -> None:
    (found,) = misfits(shape, value)
    assert found.startswith(words)
