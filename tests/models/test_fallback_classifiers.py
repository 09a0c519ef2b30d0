"""Classifiers that no native family serves, through transformers: packed where the head is one layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poolhouse import LLM, CheckpointError, PoolingParams
from tests.models.parity import Parity, Record, change_tensors
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

TOLERANCE = 1e-4

GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = LAYERS | {"num_key_value_heads": 2}
ENDS = {"bos_token_id": 0, "eos_token_id": 2}
JAMBA = GROUPED | {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "use_mamba_kernels": False,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}
DEBERTA = LAYERS | {"relative_attention": True, "max_relative_positions": 32, "pos_att_type": ["c2p", "p2c"]}
FUNNEL = {
    "vocab_size": 99,
    "block_sizes": [1, 1],
    "d_model": 32,
    "n_head": 4,
    "d_head": 8,
    "d_inner": 48,
    "pad_token_id": 1,
}
PRIVACY = GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
PACKED, UNPACKED = "transformers, packed", "transformers, unpacked"
WHOLE = "transformers, unpacked: its head is more than one linear layer"

# Model, config, options, who serves it, tasks, hub models.
ROWS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...], str]] = {
    "GPT2ForSequenceClassification": (
        "GPT2",
        GPT2,
        PACKED,
        ("classify", "token_classify"),
        "nie3e/sentiment-polish-gpt2-small",
    ),
    "GPT2ForTokenClassification": ("GPT2", GPT2, PACKED, ("token_classify",), ""),
    "Phi3ForSequenceClassification": ("Phi3", GROUPED | ENDS, PACKED, ("classify", "token_classify"), ""),
    "OPTForSequenceClassification": (
        "OPT",
        LAYERS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        PACKED,
        ("classify", "token_classify"),
        "",
    ),
    "JambaForSequenceClassification": (
        "Jamba",
        JAMBA,
        UNPACKED,
        ("classify", "token_classify"),
        "ai21labs/Jamba-tiny-reward-dev",
    ),
    "ErnieForSequenceClassification": ("Ernie", LAYERS, WHOLE, ("classify",), ""),
    "ErnieForTokenClassification": ("Ernie", LAYERS, PACKED, ("token_classify",), ""),
    "DebertaForSequenceClassification": ("Deberta", DEBERTA, WHOLE, ("classify",), "microsoft/deberta-base-mnli"),
    "DebertaForTokenClassification": ("Deberta", DEBERTA, UNPACKED, ("token_classify",), ""),
    "MegatronBertForSequenceClassification": ("MegatronBert", LAYERS, WHOLE, ("classify",), ""),
    "BigBirdForSequenceClassification": ("BigBird", LAYERS, WHOLE, ("classify",), ""),
    "BigBirdForTokenClassification": ("BigBird", LAYERS, UNPACKED, ("token_classify",), ""),
    "FunnelForTokenClassification": ("Funnel", FUNNEL, UNPACKED, ("token_classify",), ""),
    "FunnelForSequenceClassification": ("Funnel", FUNNEL, WHOLE, ("classify",), ""),
    "BartForSequenceClassification": ("Bart", BART, WHOLE, ("classify",), "facebook/bart-large-mnli"),
    "OpenAIPrivacyFilterForTokenClassification": (
        "OpenAIPrivacyFilter",
        PRIVACY,
        UNPACKED,
        ("token_classify",),
        "openai/privacy-filter",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_classifiers_without_a_native_family_answer_as_transformers_does(
    row: str, tmp_path: Path, record_parity: Record
) -> None:
    family, options, served_by, tasks, examples = ROWS[row]
    tokenize = tokenizer(tmp_path, "roberta")
    # Large enough to matter, small enough for a state space to stay finite.
    model = save(tmp_path, row, f"{family}Config", options, std=0.2, num_labels=3)
    expected = [_logits(model, tokenize(text)["input_ids"]) for text in TEXTS]
    with LLM(str(tmp_path)) as llm:
        assert llm.model.facts.served_by.startswith(served_by), llm.model.facts.served_by
        assert llm.engine.facts.tasks == tasks
        got = llm.encode(TEXTS, PoolingParams(use_activation=False), pooling_task=tasks[0])
        default = llm.encode(TEXTS, pooling_task=tasks[0])
        alone = [llm.encode(text, PoolingParams(use_activation=False), pooling_task=tasks[0])[0] for text in TEXTS]
    error = max(_relative(g.outputs.array, e) for g, e in zip(got, expected, strict=True))
    packing = max(_relative(g.outputs.array, a.outputs.array) for g, a in zip(got, alone, strict=True))
    record_parity(Parity(family, served_by.split(":")[0], "transformers", error, packing, row, tasks, examples))
    assert error < TOLERANCE
    assert packing < TOLERANCE
    for output, logits in zip(default, expected, strict=True):
        raw = row == "JambaForSequenceClassification"
        wanted = logits if raw else torch.from_numpy(logits).softmax(-1).numpy()
        assert np.allclose(output.outputs.array, wanted, atol=TOLERANCE * max(1, np.abs(wanted).max()))


def test_native_heads_and_those_of_transformers_agree(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    save(tmp_path, "BertForTokenClassification", "BertConfig", LAYERS, num_labels=5)
    answers = []
    for implementation in ("native", "transformers"):
        with LLM(str(tmp_path), model_impl=implementation) as llm:
            assert "packed" in llm.model.facts.served_by
            answers.append([output.outputs.array for output in llm.encode(TEXTS, pooling_task="token_classify")])
    assert all(np.allclose(ours, theirs, atol=TOLERANCE) for ours, theirs in zip(*answers, strict=True))


@pytest.mark.parametrize(
    ("model", "family", "options", "lost"),
    [
        ("GPT2ForSequenceClassification", "GPT2", GPT2, "score.weight"),
        ("BigBirdForSequenceClassification", "BigBird", LAYERS, "classifier.out_proj.weight"),
    ],
)
def test_a_head_is_never_made_up(model: str, family: str, options: dict[str, Any], lost: str, tmp_path: Path) -> None:
    tokenizer(tmp_path, "roberta")
    save(tmp_path, model, f"{family}Config", options, num_labels=3)
    change_tensors(tmp_path, drop=lost)
    with pytest.raises(CheckpointError, match=lost):
        LLM(str(tmp_path))


def test_a_type_without_such_a_head_is_refused(tmp_path: Path) -> None:
    tokenizer(tmp_path, "roberta")
    save(
        tmp_path,
        "MambaModel",
        "MambaConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
    )
    with pytest.raises(CheckpointError, match="no model ForSequenceClassification of model_type 'mamba'"):
        LLM(str(tmp_path), convert="classify")


CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class HomeMadeConfig(PretrainedConfig):
    model_type = "home_made"

class HomeMadeClassifier(PreTrainedModel):
    config_class = HomeMadeConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(99, 8)
        self.out = nn.Linear(8, config.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return SequenceClassifierOutput(logits=self.out(self.table(input_ids).amax(1)))
"""


def test_a_repositorys_own_classifier_is_run_where_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer(folder, "roberta")
    (folder / "code.py").write_text(CODE)
    config = {
        "model_type": "home_made",
        "architectures": ["HomeMadeForSequenceClassification"],
        "vocab_size": 99,
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
        "auto_map": {
            "AutoConfig": "code.HomeMadeConfig",
            "AutoModelForSequenceClassification": "code.HomeMadeClassifier",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    table, weight, bias = torch.randn(99, 8), torch.randn(2, 8), torch.randn(2)
    save_file({"table.weight": table, "out.weight": weight, "out.bias": bias}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        LLM(str(folder))
    with LLM(str(folder), trust_remote_code=True) as llm:
        (output,) = llm.classify(TEXTS[1])
    expected = (table[output.prompt_token_ids].amax(0) @ weight.T + bias).softmax(-1)
    assert output.outputs.probs == pytest.approx(expected.tolist(), abs=1e-5)
    assert output.outputs.label == ("yes" if expected[1] > expected[0] else "no")


@torch.inference_mode()
def _logits(model: Any, ids: list[int]) -> np.ndarray:
    answer: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return answer


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())
