"""What users may say about classifiers: activation, calibration, pooling, conversion, overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poolhouse import LLM, CheckpointError, ConfigError, PoolingParams, UnsupportedTask
from tests.models.parity import change_config, change_tensors
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

GROUPED = LAYERS | {"num_key_value_heads": 2, "head_dim": 8}
RAW = PoolingParams(use_activation=False)


def bert(folder: Path, labels: int = 3, **options: Any) -> Any:
    tokenizer(folder)
    return save(folder, "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=labels, **options)


def logits_of(llm: LLM, text: str = TEXTS[1]) -> np.ndarray:
    return llm.classify(text, pooling_params=RAW)[0].outputs.array


def test_the_activation_comes_from_the_config(tmp_path: Path) -> None:
    bert(tmp_path)
    change_config(tmp_path, problem_type="multi_label_classification")
    with LLM(str(tmp_path)) as llm:
        got = llm.classify(TEXTS[1])[0].outputs.array
        assert np.allclose(got, 1 / (1 + np.exp(-logits_of(llm))), atol=1e-5)
    change_config(
        tmp_path, problem_type=None, sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}
    )
    with LLM(str(tmp_path)) as llm:
        assert np.array_equal(llm.classify(TEXTS[1])[0].outputs.array, logits_of(llm))
    change_config(tmp_path, sentence_transformers={"activation_fn": "shutil.rmtree"})
    with pytest.raises(CheckpointError, match=r"activation_fn 'shutil\.rmtree'"):
        LLM(str(tmp_path))


def test_a_saved_cross_encoder_says_its_activation_in_its_own_file(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    plain, saved = tmp_path / "plain", tmp_path / "saved"
    bert(plain, labels=1)
    encoder = CrossEncoder(str(plain), device="cpu", activation_fn=torch.nn.Tanh())
    encoder.save_pretrained(str(saved))
    stored = json.loads((saved / "config_sentence_transformers.json").read_text())
    assert stored["activation_fn"].endswith("Tanh")
    with LLM(str(saved)) as llm:
        score = llm.score(TEXTS[0], TEXTS[1])[0].outputs.score
    assert score == pytest.approx(float(encoder.predict([(TEXTS[0], TEXTS[1])])[0]), abs=1e-4)
    with LLM(str(plain)) as llm:
        assert llm.score(TEXTS[0], TEXTS[1])[0].outputs.score != pytest.approx(score, abs=1e-3)


def test_requests_win_over_the_pooler_config_and_that_over_the_model(tmp_path: Path) -> None:
    bert(tmp_path)
    with LLM(str(tmp_path)) as llm:
        logits, probabilities = logits_of(llm), llm.classify(TEXTS[1])[0].outputs.array
    with LLM(str(tmp_path), pooler_config={"use_activation": False}) as llm:
        assert np.allclose(llm.classify(TEXTS[1])[0].outputs.array, logits, atol=1e-5)
        asked = llm.classify(TEXTS[1], pooling_params=PoolingParams(use_activation=True))
        assert np.allclose(asked[0].outputs.array, probabilities, atol=1e-5)


def test_logits_are_calibrated_before_the_activation(tmp_path: Path) -> None:
    bert(tmp_path, labels=1)
    with LLM(str(tmp_path)) as llm:
        logits = logits_of(llm)
    with LLM(str(tmp_path), pooler_config={"logit_mean": 2.0, "logit_sigma": 4.0}) as llm:
        calibrated = (logits - 2) / 4
        assert np.allclose(logits_of(llm), calibrated, atol=1e-5)
        assert np.allclose(llm.classify(TEXTS[1])[0].outputs.array, 1 / (1 + np.exp(-calibrated)), atol=1e-5)


def test_the_users_pooling_wins_over_a_family_but_not_over_a_checkpoints_word(tmp_path: Path) -> None:
    plain, fixed = tmp_path / "plain", tmp_path / "fixed"
    tokenizer(plain, "decoder")
    model = save(plain, "Qwen3ForSequenceClassification", "Qwen3Config", GROUPED, num_labels=3)
    with LLM(str(plain), pooler_config={"pooling_type": "MEAN"}) as llm:
        (output,) = llm.classify(TEXTS[1], pooling_params=RAW)
    with torch.inference_mode():
        hidden = model.model(input_ids=torch.tensor([output.prompt_token_ids])).last_hidden_state[0]
        expected = model.score(hidden.mean(0))
    assert np.allclose(output.outputs.array, expected, atol=1e-4)
    tokenizer(fixed, "roberta")
    ends = {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2, "classifier_pooling": "mean"}
    save(fixed, "ModernBertForSequenceClassification", "ModernBertConfig", LAYERS | ends, num_labels=3)
    with LLM(str(fixed)) as llm:
        wanted = logits_of(llm)
    with LLM(str(fixed), pooler_config={"pooling_type": "CLS"}) as llm:
        assert np.allclose(logits_of(llm), wanted, atol=1e-5)
    with pytest.raises(ConfigError, match="was made for one"):
        LLM(str(plain), pooler_config={"pooling_type": "CLS+MEAN"})


def test_a_classifier_can_be_run_as_an_embedder(tmp_path: Path) -> None:
    bert(tmp_path)
    with LLM(str(tmp_path), convert="embed") as llm:
        assert llm.engine.facts.tasks == ("embed", "token_embed")
        with pytest.raises(UnsupportedTask, match=r"Classification API is not supported.*--convert classify"):
            llm.classify("w1")
    with LLM(str(tmp_path), convert="none") as llm:
        assert llm.engine.facts.tasks == ("classify", "token_classify")
        with pytest.raises(UnsupportedTask, match=r"Embedding API is not supported.*--convert embed"):
            llm.embed("w1")


def test_a_head_is_never_made_up(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    save(tmp_path, "BertModel", "BertConfig", LAYERS)
    with pytest.raises(CheckpointError, match=r"lacks classifier\.weight.*never made up.*convert='embed'"):
        LLM(str(tmp_path), convert="classify")


@pytest.mark.parametrize("lost", ["classifier.weight", "bert.pooler.dense.weight"])
def test_a_missing_tensor_of_the_head_is_named(lost: str, tmp_path: Path) -> None:
    bert(tmp_path)
    change_tensors(tmp_path, drop=lost)
    with pytest.raises(CheckpointError, match=lost.removeprefix("bert.")):
        LLM(str(tmp_path))


def test_a_head_of_another_width_is_named(tmp_path: Path) -> None:
    bert(tmp_path)
    change_tensors(tmp_path, add={"classifier.weight": torch.ones(3, 31)})
    with pytest.raises(CheckpointError, match="takes 31 features, but 32 come in"):
        LLM(str(tmp_path))


def test_overrides_may_change_the_architecture(tmp_path: Path) -> None:
    tokenizer(tmp_path, "decoder")
    model = save(tmp_path, "Qwen2ForSequenceClassification", "Qwen2Config", GROUPED, num_labels=3)
    change_config(tmp_path, architectures=["Qwen2ForCausalLM"])
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.tasks == ("embed", "token_embed")
    for options in (
        {"hf_overrides": {"architectures": ["Qwen2ForSequenceClassification"]}},
        {"convert": "classify"},
    ):
        with LLM(str(tmp_path), **options) as llm:
            (output,) = llm.classify(TEXTS[1], pooling_params=RAW)
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([output.prompt_token_ids])).logits[0]
        assert np.allclose(output.outputs.array, expected, atol=1e-4)


def test_labels_have_the_checkpoints_names(tmp_path: Path) -> None:
    names = {0: "bad", 1: "fair", 2: "good"}
    bert(tmp_path, id2label=names, label2id={name: place for place, name in names.items()})
    with LLM(str(tmp_path)) as llm:
        (output,) = llm.classify(TEXTS[1])
        assert output.outputs.label == names[int(np.argmax(output.outputs.probs))]
        assert output.outputs.num_classes == 3
    change_config(tmp_path, id2label={"0": "only"})
    with LLM(str(tmp_path)) as llm:
        assert llm.classify(TEXTS[1])[0].outputs.label is None
        assert any("names 1 labels, but the head has 3" in note for note in llm.model.facts.notes)


def test_a_reward_model_of_one_label_gives_its_logit_on_request(tmp_path: Path) -> None:
    """As Skywork's: a decoder with one label, read at the last token."""
    tokenizer(tmp_path, "decoder")
    model = save(tmp_path, "LlamaForSequenceClassification", "LlamaConfig", GROUPED, num_labels=1)
    with LLM(str(tmp_path)) as llm:
        (whole,) = llm.classify(TEXTS[3], pooling_params=RAW)
        (rows,) = llm.encode(TEXTS[3], RAW, pooling_task="token_classify")
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([whole.prompt_token_ids])).logits[0]
    assert np.allclose(whole.outputs.array, expected, atol=1e-4)
    assert rows.outputs.array.shape == (20, 1)
    assert np.allclose(rows.outputs.array[-1], expected, atol=1e-4)
