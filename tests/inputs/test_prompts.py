"""Every prompt form becomes the same thing, and a wrong one is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import check_ids, parse_prompts


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        (("one", {"prompt": "two"}), ["one", "two"]),
        ({"prompt": "one", "cache_salt": "x", "multi_modal_data": None}, ["one"]),
        ("", [""]),
    ],
)
def test_texts(given: Any, texts: list[str]) -> None:
    assert [prompt.text for prompt in parse_prompts(given)] == texts


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (np.array([1, 2], np.int32), [[1, 2]]),
        ([np.array([1]), (2, 3)], [[1], [2, 3]]),
        ({"prompt_token_ids": [4]}, [[4]]),
        ([{"prompt_token_ids": (4, 5)}], [[4, 5]]),
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
        ({}, "needs 'prompt'"),
        ({"prompt": 3}, "needs 'prompt'"),
        ({"prompt_token_ids": "12"}, r"prompts\.prompt_token_ids is str"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "'multi_modal_data' is not supported"),
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
