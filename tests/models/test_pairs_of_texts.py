"""Pairs of texts from Python and over HTTP: read together, as CrossEncoder and SentenceTransformer read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from starlette.testclient import TestClient

from poolhouse import LLM, InvalidRequest, PoolingParams
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from tests.models import tiny_rerankers
from tests.models.colbert_layouts import ROWS, write
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

# Probabilities of float32 numbers that are added in another order.
TOLERANCE = 1e-5
PAIRS = [(TEXTS[0], TEXTS[1]), (TEXTS[3], ""), ("", TEXTS[2]), (TEXTS[1], TEXTS[0])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three labels, as of natural language inference."""
    folder = tmp_path_factory.mktemp("nli")
    tokenizer(folder, "bert")
    save(folder, "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=3)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    logits = CrossEncoder(str(folder), device="cpu").predict(PAIRS, convert_to_tensor=True)
    return logits.softmax(-1).numpy()


FORMS: dict[str, Any] = {
    "tuples": PAIRS,
    "lists": [list(pair) for pair in PAIRS],
    "text and text_pair": [{"text": first, "text_pair": second} for first, second in PAIRS],
    "zip": lambda: zip(*zip(*PAIRS, strict=True), strict=True),
    "array": np.array(PAIRS),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_reads_pairs_as_cross_encoder_does(form: str, llm: LLM, expected: np.ndarray) -> None:
    given = FORMS[form]
    make = given if callable(given) else lambda: given
    probs = np.stack([output.outputs.array for output in llm.classify(make(), use_tqdm=False)])
    np.testing.assert_allclose(probs, expected, atol=TOLERANCE)
    rows = llm.encode(make(), pooling_task="classify", use_tqdm=False)
    np.testing.assert_allclose(np.stack([row.outputs.array for row in rows]), expected, atol=TOLERANCE)
    # A second text matters, and so does the order.
    assert np.abs(expected[0] - expected[3]).max() > 100 * TOLERANCE


def test_pairs_and_texts_may_stand_side_by_side(llm: LLM, expected: np.ndarray) -> None:
    alone = llm.classify(TEXTS[1], use_tqdm=False)[0].outputs.array
    mixed = llm.classify([TEXTS[1], PAIRS[0], {"prompt": TEXTS[1]}, PAIRS[1]], use_tqdm=False)
    wanted = [alone, expected[0], alone, expected[1]]
    np.testing.assert_allclose(np.stack([output.outputs.array for output in mixed]), wanted, atol=TOLERANCE)
    tokens = llm.encode(PAIRS[:1], pooling_task="token_classify", use_tqdm=False)[0]
    assert tokens.outputs.array.shape == (len(tokens.prompt_token_ids), 3)
    logits = llm.classify(PAIRS[:1], pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    np.testing.assert_allclose(torch.tensor(logits[0].outputs.array).softmax(-1), expected[0], atol=TOLERANCE)


def test_http_reads_the_same_pairs(folder: Path, expected: np.ndarray) -> None:
    # The server closes its engine when it stops.
    with LLM(str(folder)) as own, TestClient(create_app([own.engine], ServerSettings())) as client:
        for form in (FORMS["lists"], FORMS["text and text_pair"]):
            labels = client.post("/classify", json={"input": form}).json()["data"]
            rows = client.post("/pooling", json={"input": form, "task": "classify"}).json()["data"]
            np.testing.assert_allclose([label["probs"] for label in labels], expected, atol=TOLERANCE)
            np.testing.assert_allclose([row["data"] for row in rows], expected, atol=TOLERANCE)
        predicted = client.post("/predict", json={"inputs": FORMS["lists"][:1]}).json()
        wrong = client.post("/classify", json={"input": ["fine", ["a", "b", "c"]]})
        places = client.post("/classify_tokens", json={"input": [["a", "b"]]})
    assert predicted[0][0]["score"] == pytest.approx(expected[0].max(), abs=TOLERANCE)
    assert (wrong.status_code, places.status_code) == (400, 400)
    assert "input[1] holds 3 texts; a pair has two" in wrong.text
    assert "a pair has two" in places.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["fine", ("a", "b", "c")], r"prompts\[1\] holds 3 texts; a pair has two"),
        (["fine", ("a", 3)], r"prompts\[1\]\[1\] is int; it must be the second text"),
        (["fine", ("a", "b " * 300)], r"prompts\[1\]: .* your pair contains"),
    ],
)
def test_a_wrong_pair_is_named(given: Any, words: str, llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=words):
        llm.classify(given, use_tqdm=False)


def test_places_are_those_of_one_text(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompts\[1\]: Character offsets need one text; a pair has two"):
        llm.token_classify(["a", ("a", "b")], use_tqdm=False)


def test_a_language_model_that_reranks_reads_pairs_by_its_template(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-Reranker-0.6B"
    tiny_rerankers.save(folder, "Qwen3")
    pairs = list(zip(tiny_rerankers.QUERIES, tiny_rerankers.DOCUMENTS, strict=True))
    with LLM(str(folder)) as llm:
        scores = [output.outputs.score for output in llm.score(*zip(*pairs, strict=True), use_tqdm=False)]
        probs = [output.outputs.probs for output in llm.classify(pairs, use_tqdm=False)]
        with TestClient(create_app([llm.engine], ServerSettings())) as client:
            predicted = client.post("/predict", json={"inputs": [list(pair) for pair in pairs]}).json()
    assert np.std(scores) > 0.01
    assert [prob for (prob,) in probs] == pytest.approx(scores, abs=TOLERANCE)
    assert [labels[0]["score"] for labels in predicted] == pytest.approx(scores, abs=TOLERANCE)


def test_an_embedder_reads_pairs_as_sentence_transformers_does() -> None:
    from poolhouse.models.files.hub import embedded_model

    reference = SentenceTransformer(str(embedded_model()), device="cpu")
    with LLM() as llm:
        found = llm.embed_array(PAIRS[:2] + PAIRS[3:], use_tqdm=False)
        with pytest.raises(InvalidRequest, match="a pair has two"):
            llm.embed_chunks([("a", "b")], chunk_size=4)
    np.testing.assert_allclose(found, reference.encode(PAIRS[:2] + PAIRS[3:]), atol=TOLERANCE)


def test_late_interaction_reads_no_pairs(tmp_path: Path) -> None:
    write(next(iter(ROWS.values())), tmp_path)
    with (
        LLM(str(tmp_path)) as llm,
        pytest.raises(InvalidRequest, match=r"prompts\[1\]: .* score compares the two"),
    ):
        llm.encode(["a", ("a", "b")], pooling_task="token_embed", use_tqdm=False)
