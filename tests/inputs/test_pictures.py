"""Prompts with pictures: placeholders become pictures, positions have three axes, and only text behind them is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.inputs.content import Content
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.pictures import PictureReader, PictureTokens, Written, WrittenPrompt, axes_of
from poolhouse.inputs.prompts import Role
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.inputs.tokenizer_files import ReadTokenizer
from poolhouse.packing.tokens import Picture, Tokens
from tests.models.qwen_vl import IMAGE, SLOT, config
from tests.models.qwen_vl import tokenizer as qwen

# What no test here asks for.
NEVER: Any = None
END = "<|im_end|>"


def picture(rows: int, columns: int, *, marks: bool = False) -> Picture:
    """A picture of so many merged patches. marks: a token before and behind its own."""
    ids = np.full(rows * columns, IMAGE)
    if marks:
        ids = np.array([1, *ids, 2])
    return Picture(np.zeros((1, 1), np.float32), ids, ids == IMAGE, (2 * rows, 2 * columns), (rows, columns))


def prompts(content: Content, role: Role | None, instruction: str | None) -> Written:
    return NEVER


@pytest.fixture(scope="module")
def tokens() -> PictureTokens:
    native = Tokenizer(ReadTokenizer(qwen().backend_tokenizer))
    return PictureTokens(PictureReader(NEVER, prompts, SLOT, IMAGE, axes=True), native)


def ids_of(text: str) -> list[int]:
    return qwen()(text, add_special_tokens=False)["input_ids"]


def encoded(tokens: PictureTokens, prompt: WrittenPrompt, **limit: Any) -> Tokens:
    (result,) = tokens.encode([prompt], [Limit(**{"max_tokens": 1000, **limit})])
    if isinstance(result, InvalidRequest):
        raise result
    return result


TEXT = f"before {SLOT} between {SLOT}{SLOT} and words behind"
SHOWN = (picture(2, 3), picture(4, 1, marks=True), picture(1, 5))


def expanded(text: str, shown: tuple[Picture, ...]) -> list[int]:
    left = iter(shown)
    return [one for token in ids_of(text) for one in (next(left).ids.tolist() if token == IMAGE else [token])]


def test_placeholders_become_pictures(tokens: PictureTokens) -> None:
    got = encoded(tokens, WrittenPrompt(Written(TEXT, END, tail_ids=(7,)), SHOWN))
    assert got.ids.tolist() == [*expanded(TEXT + END, SHOWN), 7]
    assert (got.original_tokens, got.truncated) == (len(got), False)
    assert got.pictures is not None
    assert got.pictures.pictures == SHOWN
    assert got.pictures.filled.tolist() == [token == IMAGE for token in got.ids.tolist()]


def test_token_ids_of_the_caller_take_pictures_too(tokens: PictureTokens) -> None:
    got = encoded(tokens, WrittenPrompt(Written(""), SHOWN, np.array(ids_of(TEXT))))
    assert got.ids.tolist() == expanded(TEXT, SHOWN)


def test_a_text_alone_carries_no_pictures(tokens: PictureTokens) -> None:
    got = encoded(tokens, WrittenPrompt(Written("words", END)))
    assert (got.ids.tolist(), got.pictures) == (ids_of(f"words{END}"), None)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_axes_are_those_of_transformers(kind: str, tokens: PictureTokens) -> None:
    shown = (picture(2, 3), picture(4, 1), picture(1, 5))
    got = encoded(tokens, WrittenPrompt(Written(TEXT), shown))
    assert got.pictures is not None
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    model = getattr(transformers, f"{name}Model")(config(kind))
    ids = torch.tensor(got.ids)[None]
    grids = torch.tensor([[1, *one.grid] for one in shown if one.grid is not None])
    wanted, _ = model.get_rope_index(ids, (ids == IMAGE).long(), image_grid_thw=grids)
    np.testing.assert_array_equal(got.pictures.axes, wanted[:, 0].numpy())


def test_axes_of_the_fact_sheets_example() -> None:
    filled = np.array([False] * 3 + [True] * 6 + [False])
    time, down, across = axes_of(filled, [picture(2, 3)]).tolist()
    assert time == [0, 1, 2, 3, 3, 3, 3, 3, 3, 6]
    assert down == [0, 1, 2, 3, 3, 3, 4, 4, 4, 6]
    assert across == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("text", "shown", "words"),
    [
        ("no placeholder", SHOWN[:1], r"has 0 placeholders \('<\|image_pad\|>'\) and 1 pictures"),
        (f"{SLOT}{SLOT}", SHOWN[:1], "has 2 placeholders .* and 1 pictures"),
        (f"a text with {SLOT}", (), "has 1 placeholders .* and 0 pictures"),
        ("a text with <|image_pad|> in it", (), "no text may hold another"),
    ],
)
def test_a_prompt_has_as_many_placeholders_as_pictures(
    text: str, shown: tuple[Picture, ...], words: str, tokens: PictureTokens
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        encoded(tokens, WrittenPrompt(Written(text), shown))


@pytest.mark.parametrize("long", [1, 1000])
def test_only_text_behind_the_last_picture_is_cut(long: int, tokens: PictureTokens) -> None:
    text = TEXT + " and more" * long
    whole = expanded(text, SHOWN)
    floor = len(expanded(TEXT.partition(" and words")[0], SHOWN))
    for keep in (floor + 3, floor + 12):
        got = encoded(tokens, WrittenPrompt(Written(text, END), SHOWN), keep=keep)
        assert got.ids.tolist() == [*whole[: keep - 1], *ids_of(END)]
        assert got.truncated
        assert got.pictures is not None
        assert got.pictures.axes is not None
        assert len(got.pictures.filled) == got.pictures.axes.shape[1] == keep
        left = encoded(tokens, WrittenPrompt(Written(text, END), SHOWN), keep=keep, side="left")
        assert left.ids.tolist() == [*whole[:floor], *whole[len(whole) - (keep - floor - 1) :], *ids_of(END)]
        assert left.original_tokens == len(whole) + 1
    with pytest.raises(InputTooLong, match=f"has {floor + 1} tokens that are not cut, .* but at most {floor} are read"):
        encoded(tokens, WrittenPrompt(Written(text, END), SHOWN), keep=floor)


@pytest.mark.parametrize("limit", [{"max_tokens": 20}, {"max_tokens": 20, "overflow": "chunk"}], ids=["error", "chunk"])
def test_what_is_too_long_is_refused_and_never_split(limit: dict[str, Any], tokens: PictureTokens) -> None:
    with pytest.raises(InputTooLong, match="never split"):
        encoded(tokens, WrittenPrompt(Written(TEXT), SHOWN), **limit)


def test_a_picture_behind_far_too_much_text_is_refused(tokens: PictureTokens) -> None:
    with pytest.raises(InputTooLong):
        encoded(tokens, WrittenPrompt(Written("words " * 5000 + SLOT), SHOWN[:1]), keep=-1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["some words", "moon " * 10_000], ids=["short", "far too long"])
def test_a_text_alone_is_cut_before_its_tail(text: str, side: Any, tokens: PictureTokens) -> None:
    got = encoded(tokens, WrittenPrompt(Written(text, END)), keep=7, side=side)
    ids = ids_of(text)
    assert got.ids.tolist() == [*(ids[:6] if side == "right" else ids[-6:]), *ids_of(END)]
    assert got.truncated
    assert got.original_is_estimate == (len(text) > 100)


def test_the_limit_of_one_text_counts_no_pictures(tokens: PictureTokens) -> None:
    text = f"{SLOT} and words behind"
    got = encoded(tokens, WrittenPrompt(Written(text, END), SHOWN[:1]), max_query_tokens=4)
    whole = expanded(text, SHOWN[:1])
    assert got.ids.tolist() == [*whole[: len(SHOWN[0].ids) + 4], *ids_of(END)]


def test_one_wrong_prompt_fails_alone(tokens: PictureTokens) -> None:
    good, bad = tokens.encode([WrittenPrompt(Written("a")), WrittenPrompt(Written(SLOT))], [Limit(9), Limit(9)])
    assert isinstance(good, Tokens)
    assert isinstance(bad, InvalidRequest)
