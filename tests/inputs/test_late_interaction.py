"""Tokens of queries and documents, made from rules, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from poolhouse.engine.intake import split
from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.inputs.late_interaction import Expansion, LateInteraction, LateInteractionTokens, TextRules
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt, Role
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Tokens
from tests.models.colbert_layouts import write_tokenizer

RULES = LateInteraction(
    query=TextRules("[Q] ", 8),
    document=TextRules("[D] ", 7, skipped=("?", ",", "unheard of")),
    expansion=Expansion(8, attended=False, tokens=("<mask>", "[MASK]")),
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path, ("[Q] ", "[D] "), mask=True, lower=True)
    return Tokenizer.from_folder(tmp_path)


def read(tokenizer: Tokenizer, text: str, side: Role, limit: Limit, rules: LateInteraction = RULES) -> Tokens:
    sides = LateInteractionTokens(rules, tokenizer, limit.max_tokens)
    (tokens,) = tokenizer.encode([Prompt(text)], [sides.limit(limit, side)])
    assert isinstance(tokens, Tokens), tokens
    return sides.finished(tokens, side, limit.add_special_tokens)


def test_mask_tokens_look_on_without_being_attended_to(tokenizer: Tokenizer) -> None:
    tokens = read(tokenizer, "who?", "query", Limit(64))
    assert tokenizer.decoder.strings(tokens.ids) == ["[CLS]", "[Q] ", "who", "?", "[SEP]", "[MASK]", "[MASK]", "[MASK]"]
    assert (tokens.attended, tokens.kept, tokens.truncated) == (5, None, False)
    full = read(tokenizer, "who " * 9, "query", Limit(64))
    assert (len(full), full.attended, full.truncated) == (8, None, True)
    # A filled-up query that was cut still says so.
    cut = read(tokenizer, "who " * 20, "query", Limit(64, keep=5))
    assert (len(cut), cut.attended, cut.truncated) == (8, 5, True)


def test_skipped_words_are_read_without_a_row(tokenizer: Tokenizer) -> None:
    tokens = read(tokenizer, "who?, ~", "document", Limit(64))
    assert tokenizer.decoder.strings(tokens.ids) == ["[CLS]", "[D] ", "who", "?", ",", "[UNK]", "[SEP]"]
    assert tokens.kept is not None
    assert tokens.kept.tolist() == [True, True, True, False, False, True, True]
    # Pieces of an over-long prompt keep their own part of it.
    assert [piece.kept.tolist() for piece in split(tokens, 4) if piece.kept is not None] == [
        [True, True, True, False],
        [False, True, True],
    ]


def test_places_stand_beside_their_tokens(tokenizer: Tokenizer) -> None:
    tokens = read(tokenizer, "who is", "query", Limit(64, offsets=True))
    assert tokens.offsets is not None
    assert tokens.offsets.bounds.tolist() == [[0, 0], [0, 0], [0, 3], [4, 6], *[[0, 0]] * 4]
    assert tokens.offsets.words.tolist() == [-1, -1, 0, 1, -1, -1, -1, -1]
    assert tokens.offsets.special.tolist() == [True, True, False, False, True, True, True, True]


def test_without_special_tokens_the_marker_stands_first(tokenizer: Tokenizer) -> None:
    tokens = read(tokenizer, "who is", "document", Limit(64, add_special_tokens=False))
    assert tokenizer.decoder.strings(tokens.ids) == ["[D] ", "who", "is"]


def test_a_side_without_a_length_has_the_limit_of_the_model(tokenizer: Tokenizer) -> None:
    rules = LateInteraction(TextRules("[Q] "), TextRules("[D] "))
    limit = LateInteractionTokens(rules, tokenizer, 6).limit(Limit(6), "document")
    kept, refused = tokenizer.encode([Prompt("who is it"), Prompt("who is it so")], [limit, limit])
    assert isinstance(kept, Tokens)
    assert isinstance(refused, InvalidRequest)
    assert len(read(tokenizer, "who " * 9, "document", Limit(6, overflow="truncate"), rules)) == 6


def test_only_named_tokens_get_rows_where_a_checkpoint_says_so(tokenizer: Tokenizer) -> None:
    who = tokenizer.id_of("who")
    assert who is not None
    rules = LateInteraction(TextRules(), TextRules(only=(who,)))
    tokens = read(tokenizer, "who is who", "document", Limit(64), rules)
    assert tokens.kept is not None
    assert np.array_equal(tokens.kept, tokens.ids == who)
    assert read(tokenizer, "who is who", "query", Limit(64), rules).kept is None


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (LateInteraction(TextRules("[X]"), TextRules()), r"marked by the token '\[X\]'"),
        (LateInteraction(TextRules(), TextRules(), Expansion(8, False, ("<mask>", "</s>"))), "filled up with one of"),
    ],
)
def test_tokens_that_the_tokenizer_lacks_are_named(tokenizer: Tokenizer, rules: LateInteraction, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LateInteractionTokens(rules, tokenizer, 64)
