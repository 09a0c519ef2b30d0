"""Where sentences end, by hand; the pieces are always the text."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from poolhouse.inputs.sentences import sentences

# Each is a text in its pieces.
TEXTS = [
    ["Mr. Smith went to the U.S. Embassy. ", "He met J. K. Rowling at 3.14 p.m. on Jan. 5. ", "Then he left!"],
    ['"Why?" he asked. ', '"Go." ', "She went. ", "(Really.) ", "She did"],
    ["It cost $3.50, e.g. at noon, i.e. late. ", "See Fig. 3 and No. 5. ", "No. ", "Done?! ", "Wait... ", "What… now"],
    ["First line\ngoes on here. ", "A new one\n\n", "A heading\n\n\n", "Text"],
    ["The list:\n", "1. one thing\n", "2. two things\n", "- a dash\n", "* a star"],
    ["Er kam z.B. am Abend, d.h. spät. ", "Prof. Müller blieb bzw. ging. ", "Ende"],
    ["El Sr. García llegó. ", "¿Qué hora es? ", "¡Tarde!"],
    ["Проф. Иванов пришёл. ", "А.С. Пушкин родился в Москве. ", "Конец"],
    ["吾輩は猫である。", "名前はまだ無い。", "「行くの？」と言った。", "次！"],
    ["今天天气很好。", "我们去公园吧！ ", "好吗？"],
    ["هل هذا سؤال؟ ", "نعم. ", "هذا جواب۔ ", "انتهى"],
    ["यह पहला वाक्य है। ", "यह दूसरा है॥ ", "तीसरा"],
    ["Առաջինը։ ", "Երկրորդը"],
    ["no mark at all"],
    ["a.b.c and Hello.World and v1.2.3"],
    ["  leading. \n", "Trailing.  \n\n "],
    [" \n\t"],
    [],
]


@pytest.mark.parametrize("pieces", TEXTS, ids=lambda pieces: "|".join(pieces)[:30])
def test_texts_come_apart_at_their_marks(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert [text[start:end] for start, end in sentences(text)] == pieces


def test_pieces_are_the_text_whatever_it_is() -> None:
    letters = [*"abAB01 \n\t.!?…。」)\"'-*•", "Mr.", "e.g.", "\r\n", "\u3000", "🙂", "é", "।", "\x1c"]
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices(letters, k=draw.randrange(40)))
        found = sentences(text)
        assert "".join(text[start:end] for start, end in found) == text
        assert (found[:, 0] < found[:, 1]).all()
        assert found.dtype == np.int64


@pytest.mark.parametrize(
    "part", [".", "x. ", "\n", "\n ", "1. ", " ", "A. ", '.")', "。", "- x\n", "Mr. "], ids=lambda part: repr(part)
)
def test_long_texts_take_time_by_their_length(part: str) -> None:
    text = part * 100_000 + "x"
    started = time.perf_counter()
    found = sentences(text)
    # A square of the length would be hours; this is thirty times what it takes.
    assert time.perf_counter() - started < 30
    assert found[-1, 1] == len(text)
