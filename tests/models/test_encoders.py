"""Native encoder families against transformers, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from poolhouse import kernels
from poolhouse.errors import CheckpointError
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Tokens
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
    texts,
    worst,
)

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
MODERN = TINY | TOKENS | {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 1}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", TINY),
    "bert, relu": ("Bert", TINY | {"hidden_act": "relu"}),
    "roberta": ("Roberta", TINY),
    "roberta, pad id 0": ("Roberta", TINY | {"pad_token_id": 0}),
    "xlm-roberta": ("XLMRoberta", TINY),
    "camembert": ("Camembert", TINY | {"pad_token_id": 1}),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99}),
    "mpnet": ("MPNet", TINY),
    "albert": ("Albert", TINY | {"embedding_size": 16}),
    "electra": ("Electra", TINY | {"embedding_size": 16}),
    "electra, not projected": ("Electra", TINY | {"embedding_size": 32}),
    "modernbert": ("ModernBert", MODERN),
    "modernbert, biases": ("ModernBert", MODERN | {"norm_bias": True, "attention_bias": True, "mlp_bias": True}),
    "nomic_bert": ("NomicBert", TINY),
    "gte": ("Gte", TINY),
    "jina_embeddings_v3": ("JinaEmbeddingsV3", TINY),
    "eurobert": ("EuroBert", TINY | TOKENS | {"num_key_value_heads": 2, "head_dim": 8}),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_pack_equals_transformers_one_by_one(row: str, tmp_path: Path, record_parity: Record) -> None:
    name, options = ROWS[row]
    save(tmp_path, name, options)
    transformer = load(tmp_path).transformer
    got = packed(transformer)
    parity = Parity(
        row, "native", name + "Model", worst(got, reference(tmp_path, name)), worst(got, alone(transformer))
    )
    record_parity(parity)
    # Both sides add the same float32 numbers in another order.
    assert parity.error < 1e-5
    assert parity.packing_error < 1e-5


@pytest.mark.parametrize("row", ["nomic_bert", "gte", "jina_embeddings_v3"])
def test_the_names_of_transformers_own_modules_are_read_too(row: str, tmp_path: Path, record_parity: Record) -> None:
    """save_pretrained writes the hub's names; a state dict has those of the modules."""
    name, options = ROWS[row]
    save(tmp_path, name, options)
    expected = reference(tmp_path, name)
    hub_names = set(load_file(tmp_path / "model.safetensors"))
    tensors = getattr(transformers, name + "Model").from_pretrained(tmp_path).state_dict()
    assert hub_names != set(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    transformer = load(tmp_path).transformer
    got = packed(transformer)
    parity = Parity(
        f"{row}, transformers' names", "native", name + "Model", worst(got, expected), worst(got, alone(transformer))
    )
    record_parity(parity)
    assert parity.error < 1e-5


def test_nomics_config_on_the_hub_means_the_same(tmp_path: Path, record_parity: Record) -> None:
    save(tmp_path, *ROWS["nomic_bert"])
    expected = reference(tmp_path, "NomicBert")
    hub = {
        "model_type": "nomic_bert",
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 4,
        "n_inner": 48,
        "n_positions": 8192,
        "max_trained_positions": 2048,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_scaling_factor": None,
        "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-12,
        "prenorm": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(hub))
    loaded = load(tmp_path)
    got = packed(loaded.transformer)
    parity = Parity(
        "nomic_bert, hub's config",
        "native",
        "NomicBertModel",
        worst(got, expected),
        worst(got, alone(loaded.transformer)),
    )
    record_parity(parity)
    assert parity.error < 1e-5
    assert loaded.sizes.positions == 2048
    change_config(tmp_path, moe_every_n_layers=2)
    with pytest.raises(CheckpointError, match=r"asks for 'layers\.1\.ffn\.expert_up'"):
        load(tmp_path)


def test_gtes_config_on_the_hub_means_the_same(tmp_path: Path, record_parity: Record) -> None:
    save(tmp_path, *ROWS["gte"])
    expected = reference(tmp_path, "Gte")
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "dtype"):
        config.pop(key)
    config |= {"model_type": "new", "position_embedding_type": "rope", "rope_theta": 160000, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    transformer = load(tmp_path).transformer
    got = packed(transformer)
    parity = Parity(
        "gte, hub's config (new)", "native", "GteModel", worst(got, expected), worst(got, alone(transformer))
    )
    record_parity(parity)
    assert parity.error < 1e-5


def test_gtes_ntk_scaling_follows_the_hubs_formula(tmp_path: Path) -> None:
    save(tmp_path, *ROWS["gte"])
    change_config(
        tmp_path, model_type="new", rope_parameters=None, rope_theta=10000, rope_scaling={"type": "ntk", "factor": 8.0}
    )
    (rope,) = load(tmp_path).transformer.ropes
    from poolhouse.layers.positions import rope_table
    from poolhouse.packing.pack import Segments

    cos, _ = rope_table(rope, torch.tensor([7]), Segments([1]), torch.float32)
    # Base times the factor, then every frequency divided by factor ** (2 / dim).
    dim = 8
    frequencies = 1 / (10000.0 * 8) ** (torch.arange(0, dim, 2) / dim) / 8 ** (2 / dim)
    assert torch.allclose(cos[0, 0, : dim // 2], (7 * frequencies).cos(), atol=1e-6)


def test_jina_v3_on_the_hub_calls_itself_xlm_roberta(tmp_path: Path, record_parity: Record) -> None:
    save(tmp_path, *ROWS["jina_embeddings_v3"])
    expected = reference(tmp_path, "JinaEmbeddingsV3")
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {"model_type": "xlm-roberta", "position_embedding_type": "rotary", "rotary_emb_base": 20000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    transformer = load(tmp_path).transformer
    got = packed(transformer)
    parity = Parity(
        "jina_embeddings_v3, hub's config",
        "native",
        "JinaEmbeddingsV3Model",
        worst(got, expected),
        worst(got, alone(transformer)),
    )
    record_parity(parity)
    assert parity.error < 1e-5


def test_modernberts_config_before_transformers_5_means_the_same(tmp_path: Path) -> None:
    options = MODERN | {
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 80000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    }
    save(tmp_path, "ModernBert", options)
    expected = reference(tmp_path, "ModernBert")
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("layer_types", "rope_parameters"):
        config.pop(key)
    config |= {"global_attn_every_n_layers": 2, "global_rope_theta": 80000.0, "local_rope_theta": 5000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert worst(packed(load(tmp_path).transformer), expected) < 1e-5


@torch.inference_mode()
@pytest.mark.skipif(kernels.level() is None, reason="no compiled kernels")
@pytest.mark.parametrize("row", ROWS)
def test_tables_are_read_in_one_pass_to_the_last_bit(row: str, tmp_path: Path) -> None:
    save(tmp_path, *ROWS[row])
    transformer = load(tmp_path).transformer
    pack = Batch.pack([*texts(), Tokens(np.array([9, 1, 1, 7]), np.array([0, 0, 1, 1]))])
    assert transformer._plain_tables is not None
    got = transformer._embed(pack)
    transformer.__dict__["_plain_tables"] = None
    assert torch.equal(got, transformer._embed(pack))
    # A number that is in no table is torch's error, and nothing is read.
    del transformer.__dict__["_plain_tables"]
    for wrong in (-1, len(transformer.tokens), 2**60):
        with pytest.raises(IndexError):
            transformer._embed(Batch.pack([Tokens(np.array([5, wrong]))]))


@pytest.mark.parametrize("row", ["bert", "distilbert", "albert", "modernbert", "nomic_bert", "gte"])
def test_keys_at_their_defaults_may_be_absent(row: str, tmp_path: Path) -> None:
    name, options = ROWS[row]
    save(tmp_path, name, options)
    expected = packed(load(tmp_path).transformer)
    defaults = getattr(transformers, name + "Config")().to_dict()
    config = json.loads((tmp_path / "config.json").read_text())
    lean = {key: value for key, value in config.items() if key == "model_type" or defaults.get(key) != value}
    assert len(lean) < len(config)
    (tmp_path / "config.json").write_text(json.dumps(lean))
    assert worst(packed(load(tmp_path).transformer), expected) == 0


@pytest.mark.parametrize("row", ["bert", "roberta", "modernbert", "eurobert"])
def test_bfloat16_stays_near_transformers(row: str, tmp_path: Path) -> None:
    name, options = ROWS[row]
    save(tmp_path, name, options)
    got = packed(load(tmp_path, torch.bfloat16).transformer)
    assert got[0].dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: a few last places over four layers with weights ten times larger than real ones.
    assert worst(got, reference(tmp_path, name, torch.bfloat16)) < 6e-2


@pytest.mark.parametrize(
    ("row", "model"),
    [
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification"),
        ("roberta", "RobertaForSequenceClassification"),
        ("xlm-roberta", "XLMRobertaForMaskedLM"),
        ("distilbert", "DistilBertForMaskedLM"),
        ("mpnet", "MPNetForMaskedLM"),
        ("albert", "AlbertForMaskedLM"),
        ("electra", "ElectraForPreTraining"),
        ("modernbert", "ModernBertForMaskedLM"),
        ("nomic_bert", "NomicBertForMaskedLM"),
        ("gte", "GteForMaskedLM"),
        ("eurobert", "EuroBertForMaskedLM"),
    ],
)
def test_a_checkpoint_with_a_head_gives_its_backbone(row: str, model: str, tmp_path: Path) -> None:
    name, options = ROWS[row]
    save(tmp_path, name, options, model=model)
    assert worst(packed(load(tmp_path).transformer), reference(tmp_path, name)) < 1e-5


@pytest.mark.parametrize("row", ROWS)
def test_a_lost_or_strange_tensor_is_named(row: str, tmp_path: Path) -> None:
    save(tmp_path, *ROWS[row])
    names = [name for name in load_file(tmp_path / "model.safetensors") if "pooler" not in name]
    lost = names[len(names) // 2]
    tensor = load_file(tmp_path / "model.safetensors")[lost]
    change_tensors(tmp_path, drop=lost)
    with pytest.raises(CheckpointError, match=lost.split(".")[-2]):
        load(tmp_path)
    change_tensors(tmp_path, add={lost: tensor, "layers.0.surprise.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"layers\.0\.surprise\.weight"):
        load(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    save(tmp_path, *ROWS["bert"])
    change_tensors(tmp_path, add={"encoder.layer.0.output.dense.weight": torch.ones(32, 47)})
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.weight.*unlike in the layers before"):
        load(tmp_path)
    change_tensors(tmp_path, drop="encoder.layer.0.output.dense.weight", add={
        f"encoder.layer.{layer}.output.dense.weight": torch.ones(32, 47) for layer in range(4)
    })  # fmt: skip
    with pytest.raises(CheckpointError, match="do not fit together"):
        load(tmp_path)


@pytest.mark.parametrize("way", ["sharded", "pickle", "sharded pickle"])
def test_weights_may_lie_in_several_files_or_in_a_pickle(way: str, tmp_path: Path) -> None:
    save(tmp_path, *ROWS["bert"])
    expected = packed(load(tmp_path).transformer)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if way == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        halves = {"1": names[::2], "2": names[1::2]}
        stem, suffix = ("model", "safetensors") if way == "sharded" else ("pytorch_model", "bin")
        weight_map = {}
        for half, members in halves.items():
            file = f"{stem}-{half}.{suffix}"
            part = {name: tensors[name] for name in members}
            if suffix == "bin":
                torch.save(part, tmp_path / file)
            else:
                save_file(part, tmp_path / file)
            weight_map |= dict.fromkeys(members, file)
        (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert worst(packed(load(tmp_path).transformer), expected) == 0
