"""Entities equal those of transformers' token-classification pipeline."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from poolhouse import LLM, Entity, InvalidRequest, PoolingParams
from poolhouse.engine.request import Request
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.tokens import Offsets
from poolhouse.vectors.entities import STRATEGIES, entities
from tests.checkpoints import KINDS, save_checkpoint

LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC", 5: "MISC"}
TEXTS = [
    "The moon falls under the water, and Sailors sing!",
    "Größe naïve 東京 über alles; don't bread-and-ships",
    "bread  and ships 🙂 of (London) São Paulo",
    "x",
    "",
]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("labels")
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    save_checkpoint(folder, request.param, "ForTokenClassification", **labels)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    # With one worker, the same texts make the same packs each time.
    with LLM(str(folder), lanes=1) as llm:
        yield llm


def by_transformers(folder: Path, strategy: str, text: str, **options: Any) -> list[dict[str, Any]]:
    made = transformers.pipeline("token-classification", str(folder), aggregation_strategy=strategy)
    return made(text, **options) if text else []  # type: ignore[no-any-return]


def check(found: tuple[Entity, ...], expected: list[dict[str, Any]], text: str) -> None:
    """Labels, scores and offsets, but for white space, which the reference counts in for some tokenizers."""
    expected = [one for one in expected if text[one["start"] : one["end"]].strip()]
    assert [entity.label for entity in found] == [one.get("entity_group", one.get("entity")) for one in expected]
    assert [entity.score for entity in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)
    for entity, one in zip(found, expected, strict=True):
        assert text[entity.start : entity.end] == entity.text == text[one["start"] : one["end"]].strip()
        assert one["start"] <= entity.start <= entity.end <= one["end"]


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words:UserWarning")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entities_equal_those_of_transformers(llm: LLM, folder: Path, strategy: str) -> None:
    outputs = llm.token_classify(TEXTS, aggregation_strategy=strategy)
    raws = llm.encode(TEXTS, pooling_task="token_classify")
    for text, output, raw in zip(TEXTS, outputs, raws, strict=True):
        check(output.outputs.entities, by_transformers(folder, strategy, text), text)
        assert np.array_equal(output.outputs.array, raw.outputs.array)
        assert tuple(output.outputs.data.shape) == (len(output.prompt_token_ids), len(LABELS))
    assert len({entity.label for output in outputs for entity in output.outputs.entities}) > 1


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words:UserWarning")
def test_a_cut_text_has_the_places_of_the_whole(llm: LLM, folder: Path) -> None:
    text = "Sailors of London and the songs under water, " * 40
    (output,) = llm.token_classify(text, tokenization_kwargs={"truncation": True}, aggregation_strategy="first")
    assert output.truncated
    check(output.outputs.entities, by_transformers(folder, "first", text), text)
    (end,) = llm.token_classify(
        text,
        tokenization_kwargs={"truncation": True, "truncation_side": "left"},
        aggregation_strategy="none",
        ignore_labels=(),
    )
    tail = text.rstrip()
    assert end.outputs.entities[-1].end == len(tail)
    assert all(text[entity.start : entity.end] == entity.text for entity in end.outputs.entities)


def test_a_split_text_has_entities_throughout(llm: LLM) -> None:
    text = "Sailors of London and the songs under water, " * 8
    (output,) = llm.token_classify(text, pooling_params=PoolingParams(overflow="chunk"), ignore_labels=())
    (whole,) = llm.encode(text, PoolingParams(overflow="chunk"), pooling_task="token_classify")
    assert output.chunks == whole.chunks > 1
    assert len(output.outputs.array) == len(output.prompt_token_ids)
    assert output.outputs.entities[0].start == 0
    assert output.outputs.entities[-1].end == len(text.rstrip())


def test_other_wishes(llm: LLM) -> None:
    (all_labels,) = llm.token_classify(TEXTS[0], ignore_labels=())
    assert all_labels.outputs.entities[0].start == 0
    assert all_labels.outputs.entities[-1].end == len(TEXTS[0])
    (logits,) = llm.token_classify(TEXTS[0], pooling_params=PoolingParams(use_activation=False), ignore_labels=())
    assert [entity.score for entity in logits.outputs.entities] == pytest.approx(
        [entity.score for entity in all_labels.outputs.entities], abs=1e-5
    )
    assert logits.outputs.array.min() < 0
    (same,) = asyncio.run(llm.token_classify_async(TEXTS[0], ignore_labels=()))
    assert same.outputs.entities == all_labels.outputs.entities
    with pytest.raises(InvalidRequest, match="Did you mean 'simple'"):
        llm.token_classify("x", aggregation_strategy="simpel")
    with pytest.raises(InvalidRequest, match="token ids have none"):
        llm.token_classify([1, 2, 3])


@pytest.mark.parametrize("space", ["\n", "\u00a0", "\t", "\u3000"])
def test_any_white_space_ends_a_word(llm: LLM, space: str) -> None:
    """transformers takes words of byte-level tokenizers to end at blanks alone, so that lines run together."""
    text = f"ships{space}sailors"
    (output,) = llm.token_classify(text, aggregation_strategy="first", ignore_labels=())
    (tokens,) = llm.engine.tokenize([Request(Prompt(text), "token_classify", offsets=True)])
    assert tokens.offsets is not None
    words = {word: text[start:end].strip() for word, (start, end) in zip(*_word_bounds(tokens.offsets), strict=True)}
    assert not any(space in word for word in words.values())
    assert output.outputs.entities[-1].end == len(text)


def _word_bounds(offsets: Offsets) -> tuple[list[int], list[tuple[int, int]]]:
    words = sorted(set(offsets.words.tolist()) - {-1})
    bounds = [offsets.bounds[offsets.words == word] for word in words]
    return words, [(int(own[:, 0].min()), int(own[:, 1].max())) for own in bounds]


ROWS: dict[str, tuple[list[int], str, list[tuple[str, int, int]]]] = {
    "I after B of one label": ([1, 2, 2], "simple", [("PER", 0, 8)]),
    "B begins anew": ([1, 1, 3], "simple", [("PER", 0, 2), ("PER", 3, 5), ("LOC", 6, 8)]),
    "another label begins anew": ([2, 4, 4], "simple", [("PER", 0, 2), ("LOC", 3, 8)]),
    "O is left out and parts": ([2, 0, 2], "simple", [("PER", 0, 2), ("PER", 6, 8)]),
    "without prefix neighbours join": ([5, 5, 0], "simple", [("MISC", 0, 5)]),
    "none keeps prefixes": ([1, 2, 0], "none", [("B-PER", 0, 2), ("I-PER", 3, 5)]),
}


@pytest.mark.parametrize("row", ROWS)
def test_how_labels_group(row: str) -> None:
    given, strategy, expected = ROWS[row]
    scores = np.full((5, 6), 0.02, np.float32)
    scores[range(5), [0, *given, 0]] = 0.9
    offsets = Offsets(
        np.array([[0, 0], [0, 2], [3, 5], [6, 8], [0, 0]]), np.array([-1, 0, 1, 2, -1]), np.array([1, 0, 0, 0, 1], bool)
    )
    found = entities("ab cd ef", scores, offsets, LABELS, strategy)  # type: ignore[arg-type]
    assert [(entity.label, entity.start, entity.end) for entity in found] == expected


@pytest.mark.parametrize(
    ("strategy", "expected"), [("first", ("LOC", 0.5)), ("average", ("PER", 0.55)), ("max", ("PER", 0.8))]
)
def test_how_the_tokens_of_a_word_agree(strategy: str, expected: tuple[str, float]) -> None:
    scores = np.zeros((2, 6), np.float32)
    scores[0, [2, 4]], scores[1, [2, 0]] = (0.3, 0.5), (0.8, 0.2)
    offsets = Offsets(np.array([[0, 2], [2, 4]]), np.array([0, 0]), np.zeros(2, bool))
    (found,) = entities("abcd", scores, offsets, LABELS, strategy)  # type: ignore[arg-type]
    assert (found.label, found.text) == (expected[0], "abcd")
    assert found.score == pytest.approx(expected[1])
