"""GLiNER and GLiNER2 from text to entities: as gliner 0.2.29 and gliner2 2.1.0, packed and alone, in windows, in any script.

`tests/models/tiny_gliner.py` makes the checkpoints and stores what these answer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from poolhouse import LLM, CheckpointError, Entity, InvalidRequest, PoolingParams, UnsupportedTask
from poolhouse.vectors.entities import fitting
from tests.models.tiny_gliner import (
    ACCENTED,
    ANSWERS,
    ASKED,
    ASKED_2,
    KINDS,
    KINDS_2,
    LABELS,
    MANY,
    TEXTS,
    save,
    save_2,
)

Found = list[tuple[str, int, int]]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, LLM]]:
    with LLM(save(tmp_path_factory.mktemp("gliner"), request.param)) as llm:
        yield request.param, llm


@pytest.fixture(scope="module", params=["spans", "tokens"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """One by spans, and one by tokens."""
    with LLM(save(tmp_path_factory.mktemp("gliner"), request.param)) as llm:
        yield llm


def places(entities: tuple[Entity, ...]) -> Found:
    return sorted((one.label, one.start, one.end) for one in entities)


def scores(entities: tuple[Entity, ...]) -> list[float]:
    return [one.score for one in sorted(entities, key=lambda one: (one.label, one.start, one.end))]


def same(ours: tuple[Entity, ...], theirs: tuple[Entity, ...]) -> bool:
    return places(ours) == places(theirs) and scores(ours) == pytest.approx(scores(theirs), abs=1e-4)


@pytest.mark.parametrize("what", ASKED)
def test_answers_are_those_of_gliner(model: tuple[str, LLM], what: str) -> None:
    kind, llm = model
    options, labels = dict(ASKED[what][0]), ASKED[what][1]
    flat = bool(options.pop("flat_ner", True))
    answers = json.loads(ANSWERS.read_text())[kind][what]
    outputs = llm.extract(TEXTS, labels, flat=flat, **options)  # type: ignore[arg-type]
    compared = 0
    for text, output, stored in zip(TEXTS, outputs, answers, strict=True):
        if text == ACCENTED and KINDS[kind][1] == "wordpiece":
            continue
        theirs = tuple(Entity(label, score, start, end, text[start:end]) for label, score, start, end in stored)
        assert same(output.outputs.entities, theirs), text
        assert [one.start for one in output.outputs.entities] == sorted(one.start for one in theirs)
        compared += len(theirs)
    assert compared or what == "none"


@pytest.fixture(scope="module", params=KINDS_2)
def second(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, LLM]]:
    """A GLiNER2."""
    with LLM(save_2(tmp_path_factory.mktemp("gliner2"), request.param)) as llm:
        yield request.param, llm


@pytest.mark.parametrize("what", ASKED_2)
def test_answers_are_those_of_gliner2(second: tuple[str, LLM], what: str) -> None:
    """The library reads a stop behind a text that has none, and may count it to what it finds; here texts end where they end."""
    kind, llm = second
    threshold, labels = ASKED_2[what]
    compared = 0
    outputs = llm.extract(TEXTS, labels, threshold=threshold)
    for text, output, stored in zip(TEXTS, outputs, json.loads(ANSWERS.read_text())[kind][what], strict=True):
        if text == ACCENTED and KINDS_2[kind][1] == "wordpiece":
            continue
        parts = [(label, score, start, min(end, len(text))) for label, score, start, end in stored]
        theirs = tuple(Entity(*part, text[part[2] : part[3]]) for part in parts if part[2] < len(text))
        assert same(output.outputs.entities, theirs), text
        compared += len(theirs)
    assert compared


def test_a_pack_of_schemas_answers_as_each_text_alone(second: tuple[str, LLM]) -> None:
    _, llm = second
    texts = [*TEXTS, "", " ".join(TEXTS * 20)]
    labels = {"person": "a human being", "location": ""}
    together = llm.extract(texts, labels, threshold=0.2, flat=False)
    assert together[-1].chunks > 1 or len(together[-1].prompt_token_ids) < 2048
    for text, output in zip(texts, together, strict=True):
        (alone,) = llm.extract(text, labels, threshold=0.2, flat=False)
        assert same(output.outputs.entities, alone.outputs.entities)
        assert all(one.text and one.text == text[one.start : one.end] for one in output.outputs.entities)


def test_a_pack_answers_as_each_text_alone(model: tuple[str, LLM]) -> None:
    _, llm = model
    together = llm.extract([*TEXTS, ""], LABELS, threshold=0.2, flat=False)
    for text, output in zip([*TEXTS, ""], together, strict=True):
        (alone,) = llm.extract(text, LABELS, threshold=0.2, flat=False)
        assert same(output.outputs.entities, alone.outputs.entities)
        assert all(one.text == text[one.start : one.end] for one in output.outputs.entities)
    assert together[-1].outputs.entities == ()


def test_callers_with_other_labels_and_thresholds_share_packs(llm: LLM) -> None:
    sets = [[f"{word} {number}" for word in ("a", "person", "b")[: 1 + number % 3]] for number in range(24)]
    asked = [(TEXTS[number % len(TEXTS)], own, 0.1 + number / 60) for number, own in enumerate(sets)]
    alone = [llm.extract(text, own, threshold=threshold)[0] for text, own, threshold in asked]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda one: llm.extract(one[0], one[1], threshold=one[2])[0], asked))
    each = llm.extract([text for text, _, _ in asked], sets, threshold=0.1)
    for (_, own, threshold), one, other, listed in zip(asked, alone, together, each, strict=True):
        assert same(one.outputs.entities, other.outputs.entities)
        assert all(found.score > threshold and found.label in own for found in one.outputs.entities)
        assert all(found.label in own for found in listed.outputs.entities)


def test_words_without_tokens_move_no_other_word(tmp_path: Path) -> None:
    """Zero-width joiners and stripped accents are words without a token; gliner takes other words for those behind."""
    with LLM(save(tmp_path, "two lstms")) as llm:
        plain, odd = "new york bank of england", "\u0301 new york\u0301 \u200dbank of\u0301 england \u0301"
        (one,), (other,) = (llm.extract(text, LABELS, threshold=0.1, flat=False) for text in (plain, odd))
    assert len(one.outputs.entities) > 2
    assert scores(one.outputs.entities) == pytest.approx(scores(other.outputs.entities), abs=1e-5)
    assert all(one.text == odd[one.start : one.end] for one in other.outputs.entities)


def test_a_long_text_is_read_in_windows_that_overlap(llm: LLM) -> None:
    """Where windows do not differ in what they show of its surroundings, a span is found as in a text of its own."""
    long = " ".join(TEXTS[-1] for _ in range(9))
    (output,) = llm.extract(long, LABELS, threshold=0.2)
    assert output.chunks > 4
    assert not output.truncated
    found = output.outputs.entities
    assert found
    assert max(one.end for one in found) > 0.8 * len(long)
    assert all(one.text == long[one.start : one.end] for one in found)
    assert all(first.end <= second.start for first, second in itertools.pairwise(found))
    (cut,) = llm.extract(long, LABELS, threshold=0.2, pooling_params=PoolingParams(truncate_prompt_tokens=-1))
    assert cut.truncated
    assert cut.chunks == 1
    # gliner reads the first 40 words of it, and no more.
    words = [match.end() for match in re.finditer(r"\w+(?:[-_]\w+)*|\S", long)]
    (first,) = llm.extract(long[: words[39]], LABELS, threshold=0.2)
    assert same(cut.outputs.entities, first.outputs.entities)


def test_two_hundred_labels_are_read_at_once_and_more_are_refused_with_a_reason(tmp_path: Path) -> None:
    with LLM(save(tmp_path, "spans")) as llm:
        (output,) = llm.extract(TEXTS[0], MANY, threshold=0.3)
        assert output.chunks == 1
        assert len(output.prompt_token_ids) > 200
    with (
        LLM(save(tmp_path, "two lstms")) as llm,
        pytest.raises(InvalidRequest, match=r"200 labels take .* of the 96 tokens"),
    ):
        llm.extract(TEXTS[0], MANY)


def test_a_label_that_comes_twice_is_one(llm: LLM) -> None:
    (once,) = llm.extract(TEXTS[0], LABELS, threshold=0.2)
    (twice,) = llm.extract(TEXTS[0], LABELS + LABELS[:2], threshold=0.2)
    assert same(once.outputs.entities, twice.outputs.entities)


async def _asked(llm: LLM) -> list[Any]:
    return await llm.extract_async(TEXTS, LABELS, threshold=0.2)


def test_coroutines_and_streams_answer_the_same(llm: LLM) -> None:
    import asyncio

    blocking = llm.extract(TEXTS, LABELS, threshold=0.2)
    streamed = list(llm.stream(iter(TEXTS), "extract", labels=LABELS, threshold=0.2, window=3))
    for one, awaited, other in zip(blocking, asyncio.run(_asked(llm)), streamed, strict=True):
        assert same(one.outputs.entities, awaited.outputs.entities)
        assert same(one.outputs.entities, other.outputs.entities)  # type: ignore[union-attr]


def test_warming_up_asks_for_a_label(llm: LLM) -> None:
    llm.engine.warm_up("full")
    assert llm.engine.facts.reads_labels
    assert llm.engine.facts.tasks == ("extract",)


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "labels": (["x"], {"labels": []}, "labels is empty"),
    "labels as one text": (["x"], {"labels": "person"}, "must be a list of names"),
    "a number": (["x"], {"labels": ["a", 1]}, r"labels\[1\] must be a text"),
    "nothing": (["x"], {"labels": None}, "must be a list of names, got NoneType"),
    "a blank": (["x"], {"labels": ["a", " \n"]}, r"labels\[1\] is empty"),
    "a half of a pair": (["x"], {"labels": ["\ud800"]}, "no valid Unicode"),
    "descriptions": (["x"], {"labels": {"a": "what"}}, "leave out their descriptions"),
    "lists": (["x"], {"labels": [["a"], ["b"]]}, "2 lists for 1 texts"),
    "a list within": (["x", "y"], {"labels": [["a"], []]}, r"labels\[1\] is empty"),
    "threshold": (["x"], {"labels": ["a"], "threshold": 1.01}, "threshold must be a number from 0 to 1"),
    "threshold as text": (["x"], {"labels": ["a"], "threshold": "0.5"}, "threshold must be a number"),
    "flat": (["x"], {"labels": ["a"], "flat": 1}, "flat must be true or false"),
    "ids": ([{"prompt_token_ids": [1, 2]}], {"labels": ["a"]}, "plain texts"),
    "a pair": ([("a", "b")], {"labels": ["a"]}, "plain texts"),
    "a text": (["x", "\ud800"], {"labels": ["a"]}, r"prompts\[1\].*no valid Unicode|no valid Unicode"),
    "a long text": (
        [" ".join(["the"] * 5000)],
        {"labels": ["a"], "pooling_params": PoolingParams(overflow="error")},
        "maximum context length",
    ),
    "an option of vectors": (
        ["x"],
        {"labels": ["a"], "pooling_params": PoolingParams(dimensions=3)},
        "does not support",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(llm: LLM, what: str) -> None:
    texts, options, message = WRONG[what]
    with pytest.raises(InvalidRequest, match=message):
        llm.extract(texts, **options)


def test_other_tasks_and_other_models_are_refused(llm: LLM) -> None:
    with pytest.raises(UnsupportedTask, match="Supported tasks: \\['extract'\\]"):
        llm.classify("x")
    with LLM() as embedder, pytest.raises(UnsupportedTask, match="extract"):
        embedder.extract("x", ["a"])


NOT_SERVED_2: dict[str, tuple[dict[str, Any], str]] = {
    "the architecture of GLiNER2.5": ({"architecture": "boundary"}, "architecture='boundary' is not served"),
    "another count": ({"counting_layer": "count_lstm_moe"}, "counting_layer='count_lstm_moe' is not served"),
    "a span mode": ({"span_head": {"span_mode": "x"}}, "span_mode='x' is not served"),
}


@pytest.mark.parametrize("what", NOT_SERVED_2)
def test_what_is_not_served_of_gliner2_is_named(tmp_path: Path, what: str) -> None:
    changes, message = NOT_SERVED_2[what]
    with pytest.raises(CheckpointError, match=message):
        LLM(save_2(tmp_path, "schema", **changes))


NOT_SERVED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a bi-encoder": ("spans", {"labels_encoder": "x"}, "labels_encoder='x' is not served: .*bi-encoder"),
    "relations": ("spans", {"relations_layer": "dot"}, "relations_layer"),
    "a decoder": ("spans", {"labels_decoder": "gpt2"}, "labels_decoder"),
    "a span mode": ("spans", {"span_mode": "conv_max"}, "span_mode='conv_max' is not served"),
    "words": ("spans", {"words_splitter_type": "jieba"}, "words_splitter_type='jieba'"),
    "fused layers": ("spans", {"fuse_layers": True}, "fuse_layers"),
    "an encoder's name alone": ("spans", {"encoder_config": None}, "no encoder_config"),
    "another kind": ("spans", {"model_type": "gliner_streaming_span"}, "model_type"),
    "layers": ("spans", {"num_rnn_layers": 3}, "num_rnn_layers=3, but the checkpoint has 1"),
    "an id": ("spans", {"class_token_index": 5}, "'<<ENT>>' of id 5"),
}


@pytest.mark.parametrize("what", NOT_SERVED)
def test_what_is_not_served_is_named(tmp_path: Path, what: str) -> None:
    kind, changes, message = NOT_SERVED[what]
    save(tmp_path, kind)
    config = json.loads((tmp_path / "gliner_config.json").read_text())
    (tmp_path / "gliner_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message):
        LLM(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("spans", "prompt_rep_layer.3.bias"),
        ("spans", "rnn.lstm.weight_hh_l0_reverse"),
        ("tokens", "scorer.proj_label.weight"),
        ("spans", "token_rep_layer.bert_layer.model.encoder.layer.0.output.dense.weight"),
    ],
)
def test_a_lost_or_strange_tensor_is_named(tmp_path: Path, kind: str, name: str) -> None:
    save(tmp_path, kind)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=name.split(".", maxsplit=1)[0]):
        LLM(tmp_path)
    strange = name.replace("_rep_layer", "_rep_layer.odd").replace("scorer", "scorer.odd").replace("lstm", "odd")
    save_file({**tensors, name: lost, strange: lost.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="odd"):
        LLM(tmp_path)


def test_replicas_carry_labels(tmp_path: Path) -> None:
    save(tmp_path, "spans")
    with LLM(tmp_path) as one, LLM(tmp_path, replicas=2) as two:
        texts = [*TEXTS, " ".join(TEXTS * 6)]
        pairs = zip(one.extract(texts, LABELS, threshold=0.2), two.extract(texts, LABELS, threshold=0.2), strict=True)
        assert all(same(ours.outputs.entities, other.outputs.entities) for ours, other in pairs)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("multi_label", [True, False])
def test_what_fits_together_is_chosen_as_by_comparing_all_pairs(flat: bool, multi_label: bool) -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        first = random.integers(0, 12, 60)
        rows = np.stack(
            (first, first + random.integers(0, 5, 60), random.integers(0, 3, 60), random.integers(1, 12, 60) / 12), 1
        ).astype(np.float32)
        chosen: list[int] = []
        for number in sorted(range(len(rows)), key=lambda number: -rows[number, 3]):
            if all(_fit(rows[number], rows[other], flat, multi_label) for other in chosen):
                chosen.append(number)
        wanted = sorted(map(tuple, rows[chosen].tolist()))
        assert sorted(map(tuple, rows[fitting(rows, flat, multi_label)].tolist())) == wanted


def _fit(one: Any, other: Any, flat: bool, multi_label: bool) -> bool:
    if tuple(one[:2]) == tuple(other[:2]):
        return multi_label and one[2] != other[2]
    apart = one[0] > other[1] or other[0] > one[1]
    within = (one[0] <= other[0] and one[1] >= other[1]) or (other[0] <= one[0] and other[1] >= one[1])
    return bool(apart or (within and not flat))
