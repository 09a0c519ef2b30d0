"""The comparisons of the documents' tests notice what differs."""

from __future__ import annotations

import pytest

from tests.docs.pages import Block, commands
from tests.docs.shown import LEFT_OUT, compare, parse, printed


def test_json_is_read_with_parts_left_out_and_strings_that_go_on() -> None:
    assert parse('{"a":[1,-2.5,...], ... "b":"two\n  words","c":null}') == {
        "a": [1, -2.5, LEFT_OUT],
        LEFT_OUT: LEFT_OUT,
        "b": "two words",
        "c": None,
    }
    with pytest.raises(AssertionError, match="no JSON"):
        parse('{"a": nothing}')


@pytest.mark.parametrize(
    ("shown", "got"),
    [
        ('{"a":1}', {"a": 2}),
        ('{"a":1}', {"a": 1, "b": 2}),
        ('{"a":1, ...}', {"b": 2}),
        ("[1,2]", [1]),
        ("[1,...,3]", [1, 2, 4]),
        ('{"x":0.5}', {"x": 0.6}),
        ('{"x":0.5}', {"x": "0.5"}),
        ('"embd-7306c8d38d6366b9"', "score-7306c8d38d6366b9"),
        ('"text"', "another"),
    ],
)
def test_a_reply_that_differs_is_noticed(shown: str, got: object) -> None:
    with pytest.raises(AssertionError):
        compare(parse(shown), got, numbers=True)


def test_a_reply_may_differ_in_what_is_other_at_each_run() -> None:
    shown = '{"id":"embd-7306c8d38d6366b9","created":17,"data":[[...],...],"x":0.5}'
    got = {"id": "embd-0123456789abcdef", "created": 18, "data": [[1.0], [2.0]], "x": 0.7}
    compare(parse(shown), got, numbers=False)


@pytest.mark.parametrize(
    ("shown", "got", "same"),
    [
        ("(3, 384) [1.   0.03]", "(3, 384) [1.         0.0304]", True),
        ("[0.517..., 0.283...]", "[0.5171337, 0.2833136]", True),
        ("[0.517..., 0.283...]", "[0.5271337, 0.2833136]", False),
        ("True 11", "True 12", False),
        ("PER Marie", "LOC Marie", False),
    ],
)
def test_a_printed_line_that_differs_is_noticed(shown: str, got: str, same: bool) -> None:
    assert printed(shown, got) is same


def test_commands_end_with_their_quotes() -> None:
    text = '$ curl -s host \\\n    -d \'{"a":\n  1}\'\n{"b":2}\n$ poolhouse --version\n'
    assert commands(Block("page", 1, "console", text, None, "")) == [
        (["curl", "-s", "host", "-d", '{"a":\n  1}'], '{"b":2}\n'),
        (["poolhouse", "--version"], ""),
    ]
