"""Adapters that bring a head of their own, against the peft library."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from poolhouse import LLM, CheckpointError
from poolhouse.lora import LoRARequest
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

TOLERANCE = 1e-4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tokenizer(folder)
    save(folder, "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=2)
    return folder


def adapted(base: Path, folder: Path, **options: Any) -> Any:
    """A PEFT folder with random weights, and the adapted classifier."""
    torch.manual_seed(5)
    model = transformers.BertForSequenceClassification.from_pretrained(base)
    with warnings.catch_warnings():
        # peft asks transformers for what transformers deprecates.
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, peft.LoraConfig(r=4, **options)).eval()
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        made.save_pretrained(folder)
    return made


def probabilities(llm: LLM, model: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    outputs = llm.classify(TEXTS)
    with torch.inference_mode():
        expected = [torch.softmax(model(torch.tensor([one.prompt_token_ids])).logits[0], -1) for one in outputs]
    return np.array([one.outputs.probs for one in outputs]), torch.stack(expected).numpy()


ROWS: dict[str, dict[str, Any]] = {
    "a whole head": {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
    "a change of the pooler": {"target_modules": ["query", "pooler.dense"]},
    "both": {"task_type": "SEQ_CLS", "target_modules": "all-linear"},
}


@pytest.mark.parametrize("row", ROWS)
def test_a_merged_adapter_brings_its_head(row: str, base: Path, tmp_path: Path) -> None:
    model = adapted(base, tmp_path / "a", **ROWS[row])
    for options in ({"model": str(base), "merge_adapter": str(tmp_path / "a")}, {"model": str(tmp_path / "a")}):
        with LLM(**options) as llm:
            ours, theirs = probabilities(llm, model)
            assert np.abs(ours - theirs).max() < TOLERANCE
            assert not any("left out" in note for note in llm.model.facts.notes)
    with LLM(str(base)) as llm:
        assert np.abs(probabilities(llm, model)[0] - theirs).max() > 100 * TOLERANCE


@pytest.mark.parametrize("row", ROWS)
def test_an_adapter_with_a_head_cannot_be_chosen_per_request(row: str, base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path / "a", **ROWS[row])
    words = r"The adapter 'a' in .* changes the model's head .* by merging only: merge_adapter"
    with pytest.raises(CheckpointError, match=words):
        LLM(str(base), lora_modules={"a": str(tmp_path / "a")})
    with LLM(str(base)) as llm:
        before = llm.classify(TEXTS[0])[0].outputs.probs
        for _ in range(2):
            with pytest.raises(CheckpointError, match=words):
                llm.classify(TEXTS[0], lora_request=LoRARequest("a", 1, str(tmp_path / "a")))
        assert llm.classify(TEXTS[0])[0].outputs.probs == before


def test_an_embedder_has_no_use_for_a_head_and_takes_the_adapter(base: Path, tmp_path: Path) -> None:
    model = adapted(base, tmp_path / "a", **ROWS["a whole head"])
    with LLM(str(base), convert="embed", lora_modules={"a": str(tmp_path / "a")}) as llm:
        (output,) = llm.embed(TEXTS[1], lora_request="a")
        with torch.inference_mode():
            hidden = model.base_model.model.bert(torch.tensor([output.prompt_token_ids])).last_hidden_state[0, 0]
    expected = torch.nn.functional.normalize(hidden, dim=-1).numpy()
    assert np.abs(output.outputs.array - expected).max() < TOLERANCE
