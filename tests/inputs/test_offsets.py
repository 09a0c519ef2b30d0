"""Tokens know their characters in the text as given, whatever was cut, lower-cased or put before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Offsets
from tests.checkpoints import KINDS

TEXT = "the moon falls, naïve Größe 東京 🙂 bread-and-ships of sailors! "


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    """Ours, and transformers' with the same tokenizer inside."""
    _, make, unknown, _ = KINDS[request.param]
    return Tokenizer(make()), transformers.PreTrainedTokenizerFast(tokenizer_object=make(), unk_token=unknown)


def offsets_in(tokenizer: Tokenizer, prompt: Prompt, **limit: Any) -> Offsets:
    options = {"max_tokens": 10**6, "offsets": True} | limit
    (tokens,) = tokenizer.encode([prompt], [Limit(**options)])
    assert not isinstance(tokens, InvalidRequest), tokens
    assert tokens.offsets is not None
    assert len(tokens) == len(tokens.offsets.bounds) == len(tokens.offsets.words)
    return tokens.offsets


def reference(tokenizer: Any, text: str) -> np.ndarray:
    made = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    offsets = np.array(made["offset_mapping"])
    return offsets[np.array(made["special_tokens_mask"]) == 0]


def content(found: Offsets) -> np.ndarray:
    return found.bounds[found.words >= 0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("keep", [3, 20, 60, None])
@pytest.mark.parametrize("times", [1, 400])
def test_offsets_are_those_of_the_whole_text(both: Any, side: str, keep: int | None, times: int) -> None:
    tokenizer, other = both
    text = TEXT * times
    found = content(offsets_in(tokenizer, Prompt(text), keep=keep, side=side))
    expected = reference(other, text)
    if keep is not None and keep < len(expected) + tokenizer.special_tokens:
        size = keep - tokenizer.special_tokens
        expected = expected[:size] if side == "right" else expected[-size:]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("keep", [24, None])
def test_a_prefix_shifts_nothing_and_has_no_word(both: Any, keep: int | None) -> None:
    tokenizer, _ = both
    found = offsets_in(tokenizer, Prompt("sailors of the moon", prefix="the bread "), keep=keep)
    owners = ["sailors of the moon"[start:end].strip() for start, end in content(found).tolist()]
    assert "".join(owners).startswith("s")
    assert found.bounds.min() >= 0
    assert int((found.words == -1).sum()) > tokenizer.special_tokens
    if keep is None:
        last = content(found)[-1]
        assert last[1] == len("sailors of the moon")


@pytest.mark.parametrize("times", [1, 300])
@pytest.mark.parametrize("side", ["right", "left"])
def test_lower_casing_that_lengthens_shifts_nothing(both: Any, side: str, times: int) -> None:
    """Python's lower() makes two characters of İ, so later characters move."""
    tokenizer, other = both
    text = "İİ moon İ bread " * times
    found = content(offsets_in(tokenizer, Prompt(text), lower_case=True, keep=40, side=side))
    lowered = reference(other, text.lower())
    origin = [index for index, character in enumerate(text) for _ in character.lower()]
    expected = [(origin[start], origin[end - 1] + 1) for start, end in lowered.tolist() if end > start]
    expected = expected[:10] if side == "right" else expected[-10:]
    got = [tuple(offsets) for offsets in found.tolist() if offsets[1] > offsets[0]]
    assert (got[:10] if side == "right" else got[-10:]) == expected


def test_words_are_those_of_the_tokenizer_where_it_marks_them() -> None:
    _, make, _, _ = KINDS["bert, wordpiece"]
    native = make()
    encoding = native.encode(TEXT)
    found = offsets_in(Tokenizer(make()), Prompt(TEXT))
    assert found.words.tolist() == [-1 if word is None else word for word in encoding.word_ids]


def test_ids_have_no_places() -> None:
    tokenizer = Tokenizer(KINDS["bert, wordpiece"][1]())
    (error,) = tokenizer.encode([Prompt(None, np.array([5]))], [Limit(9, offsets=True)])
    assert isinstance(error, InvalidRequest)
