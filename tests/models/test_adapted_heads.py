"""Adapters of classifiers, with the heads that they saved, against the peft library."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from poolhouse import LLM, CheckpointError, InvalidRequest, LoRARequest, PoolingParams
from tests.models.parity import Parity, Record, change_config
from tests.models.test_classifiers import DISTIL, GROUPED
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

# Logits of random weights; both sides add the same float32 numbers in another order.
TOLERANCE = 1e-4

# Kind of tokenizer, family, the base's class, options of the config, options of the adapter.
Row = tuple[str, str, str, dict[str, Any], dict[str, Any]]
ROWS: dict[str, Row] = {
    "bert": ("bert", "Bert", "Model", LAYERS, {"target_modules": ["query", "value"]}),
    "bert, pooler saved": ("bert", "Bert", "Model", LAYERS, {"modules_to_save": ["classifier", "pooler"]}),
    "bert, pooler of low rank": ("bert", "Bert", "ForMaskedLM", LAYERS, {"target_modules": "all-linear"}),
    "roberta": ("roberta", "Roberta", "Model", LAYERS, {"target_modules": ["query", "key"]}),
    "distilbert": (
        "roberta",
        "DistilBert",
        "Model",
        DISTIL,
        {"target_modules": ["q_lin"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "qwen2": ("decoder", "Qwen2", "ForCausalLM", GROUPED, {"target_modules": ["q_proj", "up_proj"]}),
}


def save_adapter(base: Path, folder: Path, row: str, task: str, labels: int) -> tuple[Any, Any]:
    """A plain base and an adapter of it; the tokenizer and peft's classifier."""
    kind, family, made, config, options = ROWS[row]
    words = tokenizer(base, kind)
    save(base, f"{family}{made}", f"{family}Config", config)
    if made == "ForMaskedLM":
        # A masked language model has no pooler, which is trained with the classifier.
        add = {"bert.pooler.dense.weight": torch.randn(32, 32) * 0.3, "bert.pooler.dense.bias": torch.randn(32)}
        save_file(load_file(base / "model.safetensors") | add, base / "model.safetensors", {"format": "pt"})
    ending = "ForSequenceClassification" if task == "SEQ_CLS" else "ForTokenClassification"
    with warnings.catch_warnings():
        # peft asks transformers for what transformers deprecates.
        warnings.simplefilter("ignore")
        model = getattr(transformers, family + ending).from_pretrained(base, num_labels=labels)
        torch.manual_seed(1)
        lora = peft.LoraConfig(task_type=task, r=4, lora_alpha=8, **options)
        adapted = peft.get_peft_model(model, lora).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(folder)
    return words, adapted


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> np.ndarray:
    answer: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return answer


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("row", ROWS)
def test_an_adapter_of_a_classifier_is_one(row: str, labels: int, tmp_path: Path, record_parity: Record) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    words, adapted = save_adapter(base, folder, row, "SEQ_CLS", labels)
    expected = np.stack([logits(adapted, words(text)["input_ids"]) for text in TEXTS])
    raw = PoolingParams(use_activation=False)
    with LLM(str(folder)) as llm:
        got = np.stack([output.outputs.array for output in llm.classify(TEXTS, pooling_params=raw)])
        alone = np.stack([llm.classify(text, pooling_params=raw)[0].outputs.array for text in TEXTS])
        assert llm.engine.facts.tasks == ("classify", "token_classify")
        assert not any("classifier" in note or "score" in note for note in llm.model.facts.notes)
    with LLM(str(base), lora_modules={"mine": str(folder)}, merge_adapter="mine") as llm:
        merged = np.stack([output.outputs.array for output in llm.classify(TEXTS, pooling_params=raw)])
    scale = np.abs(expected).max()
    error, packing = float(np.abs(got - expected).max() / scale), float(np.abs(got - alone).max() / scale)
    name = f"{row} with a LoRA adapter and its head, {labels} label{'s' * (labels > 1)}"
    record_parity(Parity(name, "native", "peft's classifier", error, packing))
    # Answers must differ from text to text by more than is tolerated.
    assert np.std(expected, axis=0).min() > 10 * TOLERANCE * scale
    assert error < TOLERANCE
    assert packing < TOLERANCE
    assert np.array_equal(merged, got)


@pytest.mark.parametrize("row", ["bert", "roberta", "qwen2"])
def test_an_adapter_of_a_token_classifier_is_one(row: str, tmp_path: Path) -> None:
    words, adapted = save_adapter(tmp_path / "base", tmp_path / "adapter", row, "TOKEN_CLS", 5)
    with LLM(str(tmp_path / "adapter")) as llm:
        assert llm.engine.facts.tasks == ("token_classify",)
        outputs = llm.encode(TEXTS, PoolingParams(use_activation=False), pooling_task="token_classify")
    for text, output in zip(TEXTS, outputs, strict=True):
        expected = logits(adapted, words(text)["input_ids"])
        assert np.abs(output.outputs.array - expected).max() < TOLERANCE * np.abs(expected).max()


def test_a_low_rank_change_of_a_classifiers_own_head_is_merged(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    words = tokenizer(base, "decoder")
    model = save(base, "LlamaForSequenceClassification", "LlamaConfig", GROUPED, num_labels=3)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "score"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, lora).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(folder)
    with LLM(str(base), lora_modules={"mine": str(folder)}, merge_adapter="mine") as llm:
        got = llm.classify(TEXTS, pooling_params=PoolingParams(use_activation=False))
    for text, output in zip(TEXTS, got, strict=True):
        expected = logits(adapted, words(text)["input_ids"])
        assert np.abs(output.outputs.array - expected).max() < TOLERANCE * np.abs(expected).max()
    with pytest.raises(CheckpointError, match=r"has a head of its own \(score\).*Merge it"):
        LLM(str(base), lora_modules={"mine": str(folder)})


def test_a_head_cannot_be_chosen_per_request(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_adapter(base, folder, "bert", "SEQ_CLS", 3)
    with pytest.raises(CheckpointError, match=r"head of its own \(classifier\.\w+.*merge_adapter='mine'"):
        LLM(str(base), lora_modules={"mine": str(folder)})
    with LLM(str(base)) as llm, pytest.raises((CheckpointError, InvalidRequest), match="head of its own"):
        llm.embed(TEXTS[0], lora_request=LoRARequest("mine", 1, str(folder)))


def test_the_user_may_want_the_backbone_alone(tmp_path: Path) -> None:
    save_adapter(tmp_path / "base", tmp_path / "adapter", "bert", "SEQ_CLS", 3)
    with LLM(str(tmp_path / "adapter"), convert="embed") as llm:
        assert llm.engine.facts.tasks == ("embed", "token_embed")
        assert any("classifier.weight" in note for note in llm.model.facts.notes)


def test_a_head_that_is_not_there_is_never_made_up(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(tmp_path / "base", folder, "bert", "SEQ_CLS", 3)
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    shutil.copytree(folder, tmp_path / "lost")
    save_file(lost, tmp_path / "lost/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks classifier\.weight"):
        LLM(str(tmp_path / "lost"))


def test_labels_are_named_beside_the_adapter_else_by_the_base(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_adapter(base, folder, "bert", "SEQ_CLS", 3)
    with LLM(str(folder)) as llm:
        assert llm.classify(TEXTS[0])[0].outputs.label is None
    change_config(base, id2label={"0": "a", "1": "b", "2": "c"})
    with LLM(str(folder)) as llm:
        assert llm.model.facts.labels == {0: "a", 1: "b", 2: "c"}
    (folder / "config.json").write_text('{"id2label": {"0": "sea", "1": "land", "2": "air"}}')
    with LLM(str(folder)) as llm:
        assert llm.model.facts.labels == {0: "sea", 1: "land", 2: "air"}
    with LLM(str(folder), hf_overrides={"id2label": {"0": "x", "1": "y", "2": "z"}}) as llm:
        assert llm.model.facts.labels == {0: "x", 1: "y", 2: "z"}
