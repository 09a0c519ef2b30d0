"""DeBERTa v2 and v3 against transformers, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from poolhouse.errors import CheckpointError
from poolhouse.models.native.families import family_of
from poolhouse.models.native.families._config import NotNative
from tests.models.parity import (
    Parity,
    Record,
    alone,
    change_config,
    change_tensors,
    load,
    packed,
    reference,
    save,
    worst,
)

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}
# As microsoft/deberta-v3-base says it; the texts of 30 tokens pass the exact buckets, which end at 4.
V3 = TINY | {
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": 32,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
OWN = {"share_att_key": False, "norm_rel_ebd": "none"}
ROWS: dict[str, dict[str, Any]] = {
    "deberta v3": V3,
    "deberta v2, convolution": V3 | {"conv_kernel_size": 3, "conv_act": "gelu"},
    "deberta v2, wide convolution": V3 | {"conv_kernel_size": 5},
    "deberta v2, projections of their own": V3 | OWN,
    "deberta v2, content to position": V3 | OWN | {"pos_att_type": ["c2p"]},
    "deberta v2, position to content": V3 | OWN | {"pos_att_type": ["p2c"]},
    "deberta v2, shared, one term": V3 | {"pos_att_type": ["p2c"]},
    "deberta v2, no term": V3 | {"pos_att_type": []},
    "deberta v2, a bucket per distance": V3 | {"position_buckets": -1, "max_relative_positions": -1},
    "deberta v2, distances beyond the table": V3 | {"position_buckets": -1, "max_relative_positions": 8},
    "deberta v2, buckets beyond the table": V3 | {"max_relative_positions": 16},
    "deberta v2, narrow embeddings": V3
    | {"embedding_size": 16, "type_vocab_size": 2, "position_biased_input": True, "hidden_act": "gelu_new"},
    "deberta v2, absolute positions only": TINY,
}


@pytest.mark.parametrize("row", ROWS)
def test_a_pack_equals_transformers_one_by_one(row: str, tmp_path: Path, record_parity: Record) -> None:
    save(tmp_path, "DebertaV2", ROWS[row])
    backbone = load(tmp_path).transformer
    got = packed(backbone)
    parity = Parity(
        row, "native", "DebertaV2Model", worst(got, reference(tmp_path, "DebertaV2")), worst(got, alone(backbone))
    )
    record_parity(parity)
    # Both sides add the same float32 numbers in another order: 7e-7 at most was seen.
    assert parity.error < 1e-5
    assert parity.packing_error < 1e-5


@pytest.mark.parametrize("row", ["deberta v3", "deberta v2, convolution"])
def test_bfloat16_stays_near_transformers(row: str, tmp_path: Path) -> None:
    save(tmp_path, "DebertaV2", ROWS[row])
    got = packed(load(tmp_path, torch.bfloat16).transformer)
    assert got[0].dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: a few last places over four layers with weights ten times larger than real ones.
    assert worst(got, reference(tmp_path, "DebertaV2", torch.bfloat16)) < 6e-2


def test_keys_at_their_defaults_may_be_absent(tmp_path: Path) -> None:
    save(tmp_path, "DebertaV2", V3)
    expected = packed(load(tmp_path).transformer)
    defaults = transformers.DebertaV2Config().to_dict()
    config = json.loads((tmp_path / "config.json").read_text())
    lean = {key: value for key, value in config.items() if key == "model_type" or defaults.get(key) != value}
    assert "max_position_embeddings" not in lean
    (tmp_path / "config.json").write_text(json.dumps(lean))
    assert worst(packed(load(tmp_path).transformer), expected) == 0
    family = family_of(config)
    assert family is not None
    assert family.spec({}) == family.spec(defaults)
    assert family.max_tokens({}) == 512


@pytest.mark.parametrize(
    ("model", "head"),
    [
        ("DebertaV2ForSequenceClassification", "classifier.weight"),
        ("DebertaV2ForTokenClassification", "classifier.weight"),
        ("DebertaV2ForMaskedLM", "cls.predictions.bias"),
    ],
)
def test_a_checkpoint_with_a_head_gives_its_backbone(model: str, head: str, tmp_path: Path) -> None:
    save(tmp_path, "DebertaV2", V3, model=model)
    loaded = load(tmp_path)
    assert head in loaded.aside
    assert worst(packed(loaded.transformer), reference(tmp_path, "DebertaV2")) < 1e-5


def test_what_v3_files_carry_beside_the_backbone_is_set_aside(tmp_path: Path) -> None:
    """microsoft/deberta-v3-base has the heads of its training, and a position table that its config leaves unused."""
    save(tmp_path, "DebertaV2", V3, model="DebertaV2ForSequenceClassification")
    expected = packed(load(tmp_path).transformer)
    heads = {
        "lm_predictions.lm_head.dense.weight": torch.ones(32, 32),
        "lm_predictions.lm_head.bias": torch.ones(99),
        "mask_predictions.LayerNorm.weight": torch.ones(32),
    }
    change_tensors(tmp_path, add={**heads, "deberta.embeddings.position_embeddings.weight": torch.ones(512, 32)})
    loaded = load(tmp_path)
    assert set(heads) < set(loaded.aside)
    assert worst(packed(loaded.transformer), expected) == 0


@pytest.mark.parametrize("row", ["deberta v2, convolution", "deberta v2, projections of their own"])
def test_every_lost_tensor_is_named_by_its_name_or_its_slot(row: str, tmp_path: Path) -> None:
    save(tmp_path, "DebertaV2", ROWS[row])
    tensors = load_file(tmp_path / "model.safetensors")
    slots = {
        "encoder.rel_embeddings.weight": "relative",
        "encoder.LayerNorm.weight": "relative_norm",
        "encoder.conv.conv.weight": "convolution",
        "encoder.conv.LayerNorm.weight": "convolution_norm",
    }
    for name in [name for name in tensors if name.endswith("weight") and ("layer." not in name or "layer.1." in name)]:
        change_tensors(tmp_path, drop=name)
        with pytest.raises(CheckpointError, match=slots.get(name, name.split(".")[-2])):
            load(tmp_path)
        change_tensors(tmp_path, add={name: tensors[name]})
    change_tensors(tmp_path, add={"encoder.surprise.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"encoder\.surprise\.weight"):
        load(tmp_path)


def test_a_config_that_asks_for_more_than_the_tensors_hold_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "DebertaV2", V3)
    change_config(tmp_path, share_att_key=False)
    with pytest.raises(CheckpointError, match="position_key"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"conv_groups": 2},
        {"conv_kernel_size": 3, "conv_act": "xielu"},
        {"hidden_act": "xielu"},
        {"relative_attention": False},
        {"pos_att_type": "p2c|p2p"},
        {"attention_head_size": 16},
    ],
)
def test_a_key_that_would_change_numbers_unheeded_is_refused_by_name(changes: dict[str, Any]) -> None:
    family = family_of({"model_type": "deberta-v2"})
    assert family is not None
    with pytest.raises(NotNative, match=list(changes)[-1]):
        family.spec(V3 | changes)
