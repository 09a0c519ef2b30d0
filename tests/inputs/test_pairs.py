"""Pairs of texts: joined and cut as the tokenizers library joins and cuts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.pairs import Template
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Tokens
from tests.models.tiny import IDS, WORDS, tokenizer

CLS, SEP = IDS["cls"], IDS["sep"]
TEMPLATES = {
    "bert": ([CLS], [SEP], [SEP], [0, 0, 0, 1, 1]),
    "roberta": ([CLS], [SEP, SEP], [SEP], []),
    # Without a template the library itself gives the second text a type; `model_input_names` takes it back.
    "decoder": ([], [], [], [0, 1]),
}


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + place) % 90] for place in range(count))


def joined(tokens: Tokenizer, query: str, document: str, limit: Limit) -> Tokens:
    (result,) = tokens.encode([Prompt(query, pair=document)], [limit])
    if isinstance(result, InvalidRequest):
        raise result
    return result


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_template_is_read_from_the_post_processor(kind: str, tmp_path: Path) -> None:
    template = Template.of(tokenizer(tmp_path, kind).backend_tokenizer, 2)
    head, middle, tail, types = TEMPLATES[kind]
    assert [part.tolist() for part in template.parts] == [head, middle, tail]
    assert template.special_tokens == len(head + middle + tail)
    given = template.types(1, 1)
    assert ([] if given is None else given.tolist()) == types


@pytest.mark.parametrize("kind", TEMPLATES)
def test_pairs_are_joined_as_the_library_joins_them(kind: str, tmp_path: Path) -> None:
    theirs = tokenizer(tmp_path, kind)
    ours = Tokenizer.from_folder(tmp_path)
    for query, document in ((words(3), words(9, 20)), (words(1), words(1)), ("", words(2)), (words(2), "")):
        # In lists, because transformers takes a lone empty second text for none.
        expected = theirs([query], [document])
        got = joined(ours, query, document, Limit(64))
        assert got.ids.tolist() == expected["input_ids"][0]
        wanted = expected.get("token_type_ids", [[0] * len(got)])[0]
        assert (np.zeros(len(got)) if got.types is None else got.types).tolist() == wanted
        assert (got.truncated, got.original_tokens) == (False, len(got))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_longest_first_equals_the_librarys_own_truncation(kind: str, side: Any, tmp_path: Path) -> None:
    theirs = tokenizer(tmp_path, kind)
    theirs.truncation_side = side
    ours = Tokenizer.from_folder(tmp_path)
    random = np.random.default_rng(0)
    cut = 0
    for _ in range(300):
        first, second, most = (int(random.integers(1, 40)), int(random.integers(1, 40)), int(random.integers(8, 50)))
        query, document = words(first), words(second, 45)
        expected = theirs(query, document, truncation="longest_first", max_length=most)["input_ids"]
        got = joined(ours, query, document, Limit(64, keep=most, side=side))
        assert got.ids.tolist() == expected, (first, second, most)
        assert got.original_tokens == first + second + ours.pair_templates[True].special_tokens
        cut += got.truncated
    assert 50 < cut < 250


@pytest.mark.parametrize("side", ["right", "left"])
def test_where_documents_have_a_limit_they_alone_are_cut_while_the_query_leaves_room(side: Any, tmp_path: Path) -> None:
    theirs = tokenizer(tmp_path)
    theirs.truncation_side = side
    ours = Tokenizer.from_folder(tmp_path)
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        first, second = int(random.integers(1, 40)), int(random.integers(1, 40))
        most, limit = int(random.integers(8, 50)), int(random.integers(1, 40))
        document = words(second, 45).split()
        shown = " ".join(document[:limit] if side == "right" else document[-limit:])
        only = "only_second" if first + 3 < most else "longest_first"
        expected = theirs(words(first), shown, truncation=only, max_length=most)["input_ids"]
        got = joined(ours, words(first), " ".join(document), Limit(64, keep=most, side=side, max_document_tokens=limit))
        assert got.ids.tolist() == expected, (first, second, most, limit)
        seen.add((only, first + min(second, limit) + 3 > most))
    assert len(seen) == 3


def test_each_side_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    got = joined(ours, words(10), words(20, 40), Limit(64, max_query_tokens=3, max_document_tokens=5))
    assert got.ids.tolist() == joined(ours, words(3), words(5, 40), Limit(64)).ids.tolist()
    assert (got.truncated, got.original_tokens) == (True, 33)
    left = joined(ours, words(10), words(20), Limit(64, max_query_tokens=3, side="left"))
    assert left.ids.tolist() == joined(ours, words(3, 7), words(20), Limit(64)).ids.tolist()


def test_a_single_text_is_cut_as_a_side(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    whole, short = ours.encode([Prompt(words(9))] * 2, [Limit(64), Limit(64, max_query_tokens=4)])
    assert isinstance(whole, Tokens)
    assert isinstance(short, Tokens)
    assert short.ids.tolist() == [*whole.ids[:5], SEP]
    assert (short.truncated, short.original_tokens) == (True, 11)


@pytest.mark.parametrize(
    ("query", "document", "said"),
    [(9, 5, ["query has 9", "Shorten the query", "max_tokens_per_query"]),
     (2, 12, ["document 12", "Shorten the document", "max_tokens_per_doc"])],
)  # fmt: skip
def test_too_long_a_pair_is_refused_with_the_side_to_shorten(
    query: int, document: int, said: list[str], tmp_path: Path
) -> None:
    tokenizer(tmp_path)
    with pytest.raises(InputTooLong) as refused:
        joined(Tokenizer.from_folder(tmp_path), words(query), words(document), Limit(12))
    assert f"contains {query + document + 3} input tokens" in str(refused.value)
    assert all(part in str(refused.value) for part in said)


def test_a_side_that_was_cut_already_is_not_the_one_to_shorten(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    with pytest.raises(InputTooLong, match=r"query has 4, the document 12.* Shorten the document.*max_tokens_per_doc"):
        joined(Tokenizer.from_folder(tmp_path), words(20), words(12), Limit(12, max_query_tokens=4))


def test_a_cut_that_leaves_no_room_is_refused(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match="truncate_prompt_tokens=4 leaves no room beside the 3 special tokens"):
        joined(Tokenizer.from_folder(tmp_path), words(5), words(5), Limit(12, keep=4))


def test_a_bad_pair_fails_alone(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    good, bad = ours.encode([Prompt(words(2), pair=words(2)), Prompt(words(2), pair="\ud800")], [Limit(12), Limit(12)])
    assert isinstance(good, Tokens)
    assert isinstance(bad, InvalidRequest)
