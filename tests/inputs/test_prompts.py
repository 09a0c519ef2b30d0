"""Every prompt form becomes the same thing, and a wrong one is named."""

from __future__ import annotations

from collections import deque
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import check_ids, parse_prompts, parse_texts


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        (("one", {"prompt": "two"}), ["one", "two"]),
        ({"prompt": "one", "cache_salt": "x", "multi_modal_data": None}, ["one"]),
        ("", [""]),
        ({"text": "one"}, ["one"]),
        ({"text": "one", "text_pair": None}, ["one"]),
        (np.str_("one"), ["one"]),
        (np.array("one"), ["one"]),
        (np.array(["one", "two"]), ["one", "two"]),
        (np.array(["one", "two"], dtype=object), ["one", "two"]),
        (pd.Series(["one", "two"], index=[7, 9]), ["one", "two"]),
        (pd.Series(["one", "two"], dtype="category"), ["one", "two"]),
        (pd.Index(["one", "two"]), ["one", "two"]),
        (pa.array(["one", "two"]), ["one", "two"]),
        (pa.chunked_array([["one"], ["two"]]), ["one", "two"]),
        (datasets.Dataset.from_dict({"text": ["one", "two"]})["text"], ["one", "two"]),
        ((text for text in ("one", "two")), ["one", "two"]),
        (map(str, [1, 2]), ["1", "2"]),
        (deque(["one", "two"]), ["one", "two"]),
        ({"a": "one", "b": "two"}.values(), ["one", "two"]),
    ],
)
def test_texts(given: Any, texts: list[str]) -> None:
    parsed = parse_prompts(given)
    assert [prompt.text for prompt in parsed] == texts
    assert all(type(prompt.text) is str and prompt.pair is None for prompt in parsed)


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        ([("a", "b")], [("a", "b")]),
        ([["a", "b"], "c", ("d", "")], [("a", "b"), ("c", None), ("d", "")]),
        ({"text": "a", "text_pair": "b"}, [("a", "b")]),
        ([{"text": "a", "text_pair": "b"}, {"prompt": "c", "text_pair": "d"}], [("a", "b"), ("c", "d")]),
        (np.array([["a", "b"], ["c", "d"]]), [("a", "b"), ("c", "d")]),
        (zip(["a", "c"], ["b", "d"], strict=True), [("a", "b"), ("c", "d")]),
        (pd.Series([("a", "b"), ("c", "d")]), [("a", "b"), ("c", "d")]),
        # Two texts by themselves are two prompts.
        (("a", "b"), [("a", None), ("b", None)]),
    ],
)
def test_pairs(given: Any, pairs: list[tuple[str, str | None]]) -> None:
    assert [(prompt.text, prompt.pair) for prompt in parse_prompts(given)] == pairs


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (np.array([1, 2], np.int32), [[1, 2]]),
        ([np.array([1]), (2, 3)], [[1], [2, 3]]),
        ({"prompt_token_ids": [4]}, [[4]]),
        ([{"prompt_token_ids": (4, 5)}], [[4, 5]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (iter([[1, 2], np.array([3])]), [[1, 2], [3]]),
    ],
)
def test_ids(given: Any, ids: list[list[int]]) -> None:
    parsed = parse_prompts(given)
    assert [prompt.ids.tolist() for prompt in parsed if prompt.ids is not None] == ids
    assert all(prompt.text is None and prompt.ids is not None and prompt.ids.dtype == np.int64 for prompt in parsed)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "You must pass at least one prompt"),
        (None, "prompts is null; it must be a text"),
        (3, "prompts is int"),
        (["a", 3], r"prompts\[1\] is int"),
        (["a", None], r"prompts\[1\] is null"),
        ([1, "a"], r"prompts\[1\] is str; it must be a token id"),
        ([1, True], r"prompts\[1\] is bool"),
        ([[1], []], r"prompts\[1\] is an empty list of token ids"),
        ([[1, 2.5]], r"prompts\[0\]\[1\] is float"),
        ([10**30], "out of vocabulary"),
        ({"promt": "x"}, "Did you mean 'prompt'"),
        (pd.Series(["a", None]), r"prompts\[1\] is NaN, a missing value; it must be"),
        (pd.Series(["a", "b", pd.NA], dtype=object, index=[5, 6, 7]), r"prompts\[2\] is <NA>, a missing value"),
        (np.array(["a", None], dtype=object), r"prompts\[1\] is null"),
        (datasets.Dataset.from_dict({"text": ["a", None]})["text"], r"prompts\[1\] is null"),
        (pd.DataFrame({"text": ["a"]}), r"prompts is a table \(DataFrame\); give one of its columns"),
        (datasets.Dataset.from_dict({"text": ["a"]}), r"a table \(Dataset\)"),
        (pa.table({"text": ["a"]}), r"a table \(Table\)"),
        ({"a", "b"}, "prompts is a set, which has no order"),
        (frozenset("a"), "prompts is a frozenset"),
        (b"bytes", "prompts is bytes, not text: decode it"),
        (["a", b"b"], r"prompts\[1\] is bytes, not text"),
        (np.array([b"a"]), r"prompts\[0\] is bytes_, not text"),
        (np.array([1.5, 2.5]), r"prompts\[0\] is float64"),
        (torch.tensor([1.5]), r"prompts\[0\] is float"),
        (iter(()), "You must pass at least one prompt"),
        (pd.Series([], dtype=object), "You must pass at least one prompt"),
        ([("a", "b", "c")], r"prompts\[0\] holds 3 texts; a pair has two"),
        (["x", ["a"]], r"prompts\[1\] holds 1 texts"),
        (["x", ("a", None)], r"prompts\[1\]\[1\] is null; it must be the second text of a pair"),
        ([{"text": "a", "text_pair": 3}], r"prompts\[0\]\.text_pair is int"),
        ({"prompt_token_ids": [1], "text_pair": "b"}, "'text_pair' beside token ids"),
        ({"text": "a", "prompt": "b"}, "'prompt' and 'text'; give one"),
        ({}, "needs 'prompt'"),
        ({"prompt": 3}, "needs 'prompt'"),
        ({"prompt_token_ids": "12"}, r"prompts\.prompt_token_ids is str"),
        (
            {"prompt": "x", "multi_modal_data": {"image": 1}},
            r"prompts\.multi_modal_data\.image is int; a picture is a URL",
        ),
        (np.ones((2, 2)), r"must be a flat list of integers, got float64\[2\]"),
    ],
)
def test_wrong_forms_are_named(given: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_prompts(given)


def test_ids_outside_the_vocabulary_are_named() -> None:
    check_ids(np.array([0, 9]), 10)
    for wrong in (10, -1):
        with pytest.raises(InvalidRequest, match=f"Token id {wrong} is out of vocabulary"):
            check_ids(np.array([3, wrong]), 10)


@pytest.mark.parametrize(
    "given",
    [np.array(["a", "b"]), pd.Series(["a", "b"]), iter(["a", "b"]), pa.array(["a", "b"]), ("a", {"text": "b"})],
    ids=lambda given: type(given).__name__,
)
def test_a_side_of_a_score_is_any_column(given: Any) -> None:
    assert parse_texts(given, "data_2") == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (pd.Series(["a", None]), r"data_2\[1\] is NaN, a missing value"),
        (pd.DataFrame({"text": ["a"]}), r"data_2 is a table"),
        ({"a"}, "data_2 is a set"),
        (b"a", "data_2 is bytes"),
        (np.array([1, 2]), r"data_2\[0\] is int64; it must be a text"),
        ([("a", "b")], r"data_2\[0\] is tuple; it must be a text"),
        (3, "data_2 is int"),
    ],
)
def test_a_wrong_side_is_named(given: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_texts(given, "data_2")
