"""Zero-shot classification with labels per request, by models of natural language inference: against transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from poolhouse import LLM, PoolingParams
from poolhouse.errors import InputTooLong, InvalidRequest, UnsupportedTask
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

# Sums of the same float32 numbers in another order, which heads of random weights enlarge.
TOLERANCE = 1e-4
LABELS = ["w3 w4", "w7", "w80"]
TEMPLATE = "w1 {} w2"
# The orders of published models: of roberta-large-mnli, of DeBERTa-v3-base-mnli-fever-anli, of cross-encoder/nli-*, of
# two labels.
ORDERS = {
    "entailment last": {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"},
    "entailment first": {0: "entailment", 1: "neutral", 2: "contradiction"},
    "entailment between": {0: "contradiction", 1: "entailment", 2: "neutral"},
    "two labels": {0: "entailment", 1: "not_entailment"},
}


def save_nli(folder: Path, names: dict[int, str]) -> None:
    tokenizer(folder)
    ids = {name: index for index, name in names.items()}
    save(folder, "BertForSequenceClassification", "BertConfig", LAYERS, id2label=names, label2id=ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nli")
    save_nli(folder, ORDERS["entailment last"])
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as llm:
        yield llm


def reference(folder: Path, texts: list[str], labels: list[str], **options: Any) -> np.ndarray[Any, Any]:
    """[texts, labels] by transformers' pipeline."""
    asked = transformers.pipeline("zero-shot-classification", str(folder), device="cpu")
    answers = asked(texts, candidate_labels=labels, hypothesis_template=TEMPLATE, **options)
    return np.array(
        [[dict(zip(one["labels"], one["scores"], strict=True))[label] for label in labels] for one in answers]
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("multi_label", [False, True])
def test_probabilities_are_those_of_transformers(order: str, multi_label: bool, tmp_path: Path) -> None:
    save_nli(tmp_path, ORDERS[order])
    wanted = reference(tmp_path, TEXTS, LABELS, multi_label=multi_label)
    with LLM(tmp_path) as llm:
        outputs = llm.classify(TEXTS, labels=LABELS, multi_label=multi_label, hypothesis_template=TEMPLATE)
    np.testing.assert_allclose([output.outputs.array for output in outputs], wanted, atol=TOLERANCE)
    assert [output.outputs.label for output in outputs] == [LABELS[best] for best in wanted.argmax(axis=1)]


def test_one_label_is_true_or_false_as_in_transformers(llm: LLM, folder: Path) -> None:
    (output,) = llm.classify(TEXTS[0], labels=LABELS[:1], hypothesis_template=TEMPLATE)
    wanted = reference(folder, TEXTS[:1], LABELS[:1])
    np.testing.assert_allclose(output.outputs.probs, wanted[0], atol=TOLERANCE)


def test_a_contradiction_is_found_by_its_name(tmp_path: Path) -> None:
    """transformers takes the first label, whatever it is called."""
    save_nli(tmp_path, {0: "neutral", 1: "entailment", 2: "contradiction"})
    with LLM(tmp_path) as llm:
        (output,) = llm.classify(TEXTS[0], labels=["w3"], hypothesis_template="{}")
        (pair,) = llm.classify([(TEXTS[0], "w3")], pooling_params=PoolingParams(use_activation=False))
    odds = pair.outputs.array[1] - pair.outputs.array[2]
    np.testing.assert_allclose(output.outputs.probs, [1 / (1 + np.exp(-odds))], atol=1e-6)


def test_logits_where_no_activation_is_wanted(llm: LLM) -> None:
    raw = PoolingParams(use_activation=False)
    for multi_label in (False, True):
        (logits,) = llm.classify(TEXTS[0], labels=LABELS, multi_label=multi_label, pooling_params=raw)
        (probabilities,) = llm.classify(TEXTS[0], labels=LABELS, multi_label=multi_label)
        weights = np.exp(logits.outputs.array.astype(np.float64))
        wanted = weights / (1 + weights) if multi_label else weights / weights.sum()
        np.testing.assert_allclose(probabilities.outputs.probs, wanted, atol=1e-6)


def test_the_default_template_is_that_of_transformers(llm: LLM) -> None:
    (default,) = llm.classify(TEXTS[0], labels=LABELS)
    (named,) = llm.classify(TEXTS[0], labels=LABELS, hypothesis_template="This example is {}.")
    assert default.outputs.probs == named.outputs.probs


def test_each_text_may_have_labels_of_its_own(llm: LLM) -> None:
    sets = [LABELS, ["w9"], ["w5", "w6"]]
    outputs = llm.classify(TEXTS[:3], labels=sets)
    for text, labels, output in zip(TEXTS, sets, outputs, strict=False):
        (alone,) = llm.classify([text], labels=labels)
        assert output.outputs.num_classes == len(labels)
        assert output.outputs.label == alone.outputs.label
        np.testing.assert_allclose(output.outputs.probs, alone.outputs.probs, atol=1e-6)


def test_many_texts_and_labels_are_asked_in_windows(llm: LLM) -> None:
    labels = [f"w{number}" for number in range(60)]
    outputs = llm.classify(TEXTS * 10, labels=labels, use_tqdm=False)
    for text, output in zip(TEXTS, outputs[-len(TEXTS) :], strict=True):
        (alone,) = llm.classify([text], labels=labels)
        np.testing.assert_allclose(output.outputs.probs, alone.outputs.probs, atol=1e-6)


def test_an_output_counts_the_tokens_of_all_pairs(llm: LLM) -> None:
    (output,) = llm.classify("w1 w2", labels=["w3", "w4 w5"], hypothesis_template="{}")
    # [CLS] w1 w2 [SEP] w3 [SEP], and one more.
    assert len(output.prompt_token_ids) == output.original_tokens == 6 + 7


def test_coroutines_answer_alike(llm: LLM) -> None:
    here = llm.classify(TEXTS, labels=LABELS)
    there = asyncio.run(llm.classify_async(TEXTS, labels=LABELS))
    assert [output.outputs.label for output in here] == [output.outputs.label for output in there]


def test_a_stream_answers_alike(llm: LLM) -> None:
    outputs = llm.classify(TEXTS, labels=LABELS)
    streamed = list(llm.stream(iter(TEXTS), "classify", labels=LABELS))
    for one, other in zip(outputs, streamed, strict=True):
        np.testing.assert_allclose(other.outputs.probs, one.outputs.probs, atol=1e-6)  # type: ignore[union-attr]


def test_an_empty_text_has_an_answer(llm: LLM) -> None:
    (output,) = llm.classify("", labels=LABELS)
    assert sum(output.outputs.probs) == pytest.approx(1)


def test_a_text_too_long_is_refused_or_cut(llm: LLM) -> None:
    with pytest.raises(InputTooLong, match=r"prompts\[1\].*64 tokens"):
        llm.classify(["w1", "w1 " * 100], labels=LABELS)
    (output,) = llm.classify("w1 " * 100, labels=LABELS, tokenization_kwargs={"truncation": True})
    assert output.truncated


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels is empty"),
        ("w1", "labels must be a list of names"),
        ({"w1", "w2"}, "a set, which has no order"),
        ({"w1": "w2"}, "leave out their descriptions"),
        (["w1", "w1"], "labels has 'w1' twice"),
        (["w1", ""], r"labels\[1\] is empty"),
        (["w1", 5], r"labels\[1\] must be a text"),
        ([["w1"], ["w2"]], "labels has 2 lists for 1 texts"),
        ([[]], "is empty; name at least one label"),
        (["w1", ["w2"]], r"labels\[1\] must be a text"),
        ([["w1", None]], r"\[1\] must be a text"),
    ],
)
def test_labels_that_are_none_are_refused(llm: LLM, labels: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.classify(TEXTS[0], labels=labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hypothesis_template": "w1"}, "hypothesis_template must hold {} once"),
        ({"hypothesis_template": "{} {}"}, "hypothesis_template must hold {} once"),
        ({"pooling_params": [PoolingParams()]}, "one PoolingParams for all prompts"),
    ],
)
def test_options_that_mean_nothing_are_refused(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.classify(TEXTS[0], labels=LABELS, **options)


@pytest.mark.parametrize("prompt", [[1, 2], {"text": "w1", "text_pair": "w2"}, {"prompt_token_ids": [1]}])
def test_labels_are_for_texts(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="labels are for texts"):
        llm.classify(prompt, labels=LABELS)


def test_options_of_labels_need_labels(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="give labels too"):
        llm.classify(TEXTS[0], multi_label=True)


def test_models_without_entailment_take_no_labels(tmp_path: Path) -> None:
    save_nli(tmp_path / "own", {0: "good", 1: "bad"})
    with LLM(tmp_path / "own") as llm, pytest.raises(UnsupportedTask, match=r"labels of its own: \['good', 'bad'\]"):
        llm.classify(TEXTS[0], labels=LABELS)
    tokenizer(tmp_path / "embedder")
    save(tmp_path / "embedder", "BertModel", "BertConfig", LAYERS)
    with LLM(tmp_path / "embedder") as llm, pytest.raises(UnsupportedTask, match="Classification API"):
        llm.classify(TEXTS[0], labels=LABELS)
