"""GLiClass from text to probability: as gliclass 0.1.21, and as its formula where that has not answered (`tiny_gliclass`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from poolhouse import LLM, PoolingParams
from poolhouse.errors import CheckpointError, ConfigError, InputTooLong, InvalidRequest, UnsupportedTask
from poolhouse.inputs.label_prompts import LABEL, SEPARATOR, LabelPrompts
from poolhouse.inputs.labels import Labels
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Tokens
from poolhouse.server.app import create_app
from tests.inputs.test_tokenizer import byte_bpe, unigram, wordpiece
from tests.models.parity import Parity, Record, change_config
from tests.models.tiny_gliclass import ANSWERS, ROWS, SETS, TEXTS, logits, save

# Both sides add the same float32 numbers in another order, which heads of random weights enlarge.
TOLERANCE = 2e-4
RAW = PoolingParams(use_activation=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gliclass")
    save(folder, "deberta v3, first")
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as llm:
        yield llm


@pytest.mark.parametrize("row", ROWS)
def test_a_pack_of_different_labels_is_each_text_alone(row: str, tmp_path: Path, record_parity: Record) -> None:
    save(tmp_path, row)
    answers = json.loads(ANSWERS.read_text())[row]
    wanted = np.concatenate([answer["logits"] for answer in answers])
    formula = np.concatenate([logits(tmp_path, text, labels) for text, labels in zip(TEXTS, SETS, strict=True)])
    with LLM(tmp_path) as llm:
        assert llm.engine.facts.tasks == ("classify",)
        served_by = llm.model.facts.served_by
        outputs = llm.classify(TEXTS, labels=SETS, pooling_params=RAW)
        packed = np.concatenate([output.outputs.array for output in outputs])
        single = [output.outputs for output in llm.classify(TEXTS, labels=SETS)]
        several = [output.outputs.array for output in llm.classify(TEXTS, labels=SETS, multi_label=True)]
        alone = np.concatenate(
            [
                llm.classify(text, labels=labels, pooling_params=RAW)[0].outputs.array
                for text, labels in zip(TEXTS, SETS, strict=True)
            ]
        )
    largest = np.abs(wanted).max()
    parity = Parity(
        f"GLiClass: {row}",
        served_by,
        "gliclass",
        float(np.abs(packed - wanted).max() / largest),
        float(np.abs(packed - alone).max() / largest),
        "GLiClassModel",
        ("classify",),
    )
    record_parity(parity)
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE
    assert np.abs(formula - wanted).max() / largest < TOLERANCE
    np.testing.assert_allclose(
        np.concatenate(several), np.concatenate([answer["multi"] for answer in answers]), atol=TOLERANCE
    )
    for output, labels, (best, score) in zip(single, SETS, (answer["best"] for answer in answers), strict=True):
        assert output.label == best
        # gliclass takes a softmax of one label too, which is always 1.
        assert len(labels) == 1 or max(output.probs) == pytest.approx(score, abs=TOLERANCE)


def test_probabilities_are_a_softmax_or_of_each_label(llm: LLM, folder: Path) -> None:
    wanted = logits(folder, TEXTS[0], SETS[0])
    (single,) = llm.classify(TEXTS[0], labels=SETS[0])
    (several,) = llm.classify(TEXTS[0], labels=SETS[0], multi_label=True)
    np.testing.assert_allclose(single.outputs.probs, wanted.softmax(0), atol=TOLERANCE)
    np.testing.assert_allclose(several.outputs.probs, wanted.sigmoid(), atol=TOLERANCE)
    assert single.outputs.label == several.outputs.label == SETS[0][int(wanted.argmax())]
    assert single.outputs.num_classes == 3


def test_one_label_alone_is_true_or_false(llm: LLM, folder: Path) -> None:
    """A softmax of one number would say nothing."""
    (output,) = llm.classify(TEXTS[0], labels=["w80"])
    np.testing.assert_allclose(output.outputs.probs, logits(folder, TEXTS[0], ["w80"]).sigmoid(), atol=TOLERANCE)


def test_two_hundred_labels(llm: LLM, folder: Path) -> None:
    labels = [f"w{number % 90} w{number // 90}" for number in range(160)]
    (output,) = llm.classify("w5", labels=labels[:150], pooling_params=RAW)
    np.testing.assert_allclose(output.outputs.array, logits(folder, "w5", labels[:150]), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputTooLong, match=r"The labels take 600 of 512 tokens and leave no room") as raised:
        llm.classify("w5", labels=[f"{label} w{place}" for place, label in enumerate(labels[:150])])
    assert raised.value.parameter == "labels"


def test_a_text_too_long_is_refused_or_cut(llm: LLM, folder: Path) -> None:
    text, labels = "w1 " * 20 + "w2 " * 600, ["w3", "w4 w5"]
    with pytest.raises(InputTooLong, match=r"text and its labels contain 628, of which the labels take 5"):
        llm.classify(text, labels=labels)
    for side, kept in (("right", "w1 " * 20 + "w2 " * 484), ("left", "w2 " * 504)):
        params = PoolingParams(truncate_prompt_tokens=-1, truncation_side=side, use_activation=False)
        (output,) = llm.classify(text, labels=labels, pooling_params=params)
        assert (len(output.prompt_token_ids), output.original_tokens, output.truncated) == (512, 628, True)
        np.testing.assert_allclose(output.outputs.array, logits(folder, kept, labels), rtol=1e-3, atol=1e-3)
    (output,) = llm.classify(text, labels=labels, pooling_params=PoolingParams(max_tokens_per_query=7))
    assert (len(output.prompt_token_ids), output.truncated) == (7 + 5 + 3, True)
    with pytest.raises(InputTooLong, match="of 6 tokens and leave no room"):
        llm.classify(text, labels=labels, pooling_params=PoolingParams(truncate_prompt_tokens=6))


@pytest.mark.parametrize("prompt", [[1, 2], {"text": "w1", "text_pair": "w2"}, {"messages": [{"role": "user"}]}])
def test_labels_are_for_texts(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="labels are for texts"):
        llm.classify(prompt, labels=SETS[0])


def test_a_request_without_labels_is_told(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="reads labels with each text"):
        llm.classify(TEXTS[0])
    with pytest.raises(InvalidRequest, match="reads labels with each text"):
        llm.encode(TEXTS[0], pooling_task="classify")
    with pytest.raises(UnsupportedTask, match="labels of the request"):
        llm.score("w1", "w2")
    with pytest.raises(InvalidRequest, match="hypothesis_template is for models of entailment"):
        llm.classify(TEXTS[0], labels=SETS[0], hypothesis_template="so {}")


def test_marks_belong_between_labels(llm: LLM) -> None:
    for label in (f"w1{LABEL}w2", f"w1 {SEPARATOR}", LABEL):
        with pytest.raises(InvalidRequest, match="stand between labels, never within"):
            llm.classify(TEXTS[0], labels=["w3", label])
    (output,) = llm.classify(f"w1 {LABEL} w2 {SEPARATOR} w3", labels=["w3", "w4"])
    assert output.outputs.num_classes == 2


def test_callers_at_once_with_labels_of_their_own(llm: LLM) -> None:
    def ask(turn: int) -> list[float]:
        (output,) = llm.classify(TEXTS[turn % 5], labels=SETS[turn % 5])
        return output.outputs.probs

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    for turn, answer in enumerate(answers):
        np.testing.assert_allclose(answer, ask(turn), atol=TOLERANCE)


def test_http_answers_alike(folder: Path) -> None:
    llm = LLM(folder)
    offline = llm.classify(TEXTS, labels=SETS, multi_label=True)
    with TestClient(create_app([llm.engine])) as http:
        reply = http.post("/classify", json={"input": TEXTS, "labels": SETS, "multi_label": True})
        missing = http.post("/classify", json={"input": TEXTS})
    for item, output in zip(reply.json()["data"], offline, strict=True):
        assert item["label"] == output.outputs.label
        np.testing.assert_allclose(item["probs"], output.outputs.probs, atol=TOLERANCE)
    assert (missing.status_code, missing.json()["param"]) == (400, "labels")


# As the tokenizers of published checkpoints treat the ends of a text, and what stands beside a mark.
TOKENIZERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte bpe": byte_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("labels_first", [True, False])
def test_parts_have_the_tokens_of_the_whole(kind: str, labels_first: bool) -> None:
    native = TOKENIZERS[kind]()
    native.add_tokens([LABEL, SEPARATOR])
    ids = native.token_to_id(LABEL), native.token_to_id(SEPARATOR)
    rules = LabelPrompts(labels_first, False, True, False, *ids)
    reader = rules.tokens(Tokenizer(native), 512)
    names = ("good", " very bad ", "été", "a  b")
    texts = ["hello world", " blank before", "blank behind ", "", "  ", "naïve café\n", "日本語 text", "x" * 50]
    written = "".join(LABEL + name for name in names) + SEPARATOR
    for text, tokens in zip(texts, reader.encode(texts, [Labels(names)] * 8, [Limit(512)] * 8), strict=True):
        assert isinstance(tokens, Tokens)
        assert tokens.ids.tolist() == native.encode(written + text if labels_first else text + written).ids
        assert tokens.marks is not None
        assert [tokens.ids[start] for start, _ in tokens.marks.labels] == [ids[0]] * 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architecture_type", "bi-encoder", "architecture_type='bi-encoder' is not served; 'uni-encoder' is"),
        ("scorer_type", "cross-attn", "scorer_type='cross-attn' is not served"),
        ("pooling_strategy", "rms", "pooling_strategy='rms' is not served"),
        ("class_token_pooling", "max", "class_token_pooling='max' is not served"),
        ("use_lstm", True, "use_lstm=True is not served"),
        ("squeeze_layers", True, "squeeze_layers=True is not served"),
        ("use_segment_embeddings", True, "use_segment_embeddings=True is not served"),
        ("use_calibrator", True, "use_calibrator=True is not served"),
        ("encoder_layer_id", 3, "encoder_layer_id=3 is not served"),
        ("encoder_config", None, "has no encoder_config"),
        ("encoder_config", {"model_type": "qwen2"}, "over qwen2 is not served"),
        ("encoder_config", {"model_type": "t5"}, "must be of a native family"),
        ("projector_hidden_act", "odd", "projector_hidden_act 'odd' is not one of"),
        ("class_token_index", 5, "<<LABEL>> is token 5; the tokenizer has 94"),
        ("scorer_type", "mlp", "lacks model.scorer.mlp.0.weight"),
    ],
)
def test_what_is_not_served_is_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, "deberta v3, first")
    change_config(tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=message):
        LLM(tmp_path)


def test_pools_of_the_text_alone_that_are_not_served(tmp_path: Path) -> None:
    save(tmp_path, "last", extract_text_features=True)
    with pytest.raises(CheckpointError, match="extract_text_features and pooling_strategy='last'"):
        LLM(tmp_path)


def test_tensors_are_read_strictly(tmp_path: Path) -> None:
    save(tmp_path, "bert, labels by their tokens")
    tensors = load_file(tmp_path / "model.safetensors")
    weights = tmp_path / "model.safetensors"
    save_file({**tensors, "model.scorer.mlp.0.weight": torch.zeros(2)}, weights)
    with pytest.raises(CheckpointError, match=r"1 tensors too many: \['model\.scorer\.mlp\.0\.weight'\]"):
        LLM(tmp_path)
    save_file({**tensors, "model.text_projector.linear_1.weight": torch.zeros(32, 8)}, weights)
    with pytest.raises(CheckpointError, match=r"model\.text_projector\.linear_1\.weight is \[32, 8\]"):
        LLM(tmp_path)
    del tensors["model.classes_projector.linear_2.bias"]
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"lacks model\.classes_projector\.linear_2\.bias"):
        LLM(tmp_path)


def test_options_for_other_models_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="answers by its own head"):
        LLM(folder, convert="embed")
