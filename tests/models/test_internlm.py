"""InternLM2 against a Llama of transformers with the same numbers; InternLM2's own code does not run on transformers 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
}
ROWS: dict[str, dict[str, Any]] = {
    "internlm2": {},
    "internlm2, one kv head": {"num_key_value_heads": 1},
    "internlm2, a kv head per head": {"num_key_value_heads": 4},
    "internlm2, biases": {"attention_bias": True},
    "internlm2, dynamic rope": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e6},
    },
}
RENAMED = {
    "model.embed_tokens": "model.tok_embeddings",
    "model.norm": "model.norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def save_internlm2(folder: Path, options: dict[str, Any]) -> tuple[Path, Path]:
    """The same random numbers twice: a Llama of transformers, and as the hub has InternLM2."""
    llama, internlm2 = folder / "llama", folder / "internlm2"
    save(llama, "Llama", TINY | options, model="LlamaForCausalLM")
    config = json.loads((llama / "config.json").read_text())
    internlm2.mkdir()
    save_file(as_internlm2(load_file(llama / "model.safetensors"), config), internlm2 / "model.safetensors")
    rope = config["rope_parameters"]
    scaling = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}
    hub = {
        "architectures": ["InternLM2ForRewardModel"],
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "attn_implementation": "eager",
        "bias": config["attention_bias"],
        "hidden_act": "silu",
        "max_position_embeddings": config["max_position_embeddings"],
        "model_type": "internlm2",
        "pretraining_tp": 1,
        "reward_token_id": 98,
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_scaling": scaling,
        "rope_theta": rope["rope_theta"],
        **{key: config[key] for key in TINY},
    }
    (internlm2 / "config.json").write_text(json.dumps(hub))
    return llama, internlm2


def as_internlm2(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Llama's tensors under InternLM2's names; each kv head follows the query heads that share it."""
    hub = {"v_head.weight": torch.ones(1, TINY["hidden_size"])}
    for name, tensor in tensors.items():
        found = next((theirs for ours, theirs in RENAMED.items() if f"{ours}." in name), None)
        if found is not None:
            kind = name.rpartition(".")[2]
            layer = name.split(".")[2] if ".layers." in name else None
            hub[f"{found}.{kind}" if layer is None else f"model.layers.{layer}.{found}.{kind}"] = tensor
    head, groups = TINY["hidden_size"] // TINY["num_attention_heads"], config["num_key_value_heads"]
    shared = TINY["num_attention_heads"] // groups
    for layer in range(TINY["num_hidden_layers"]):
        for kind in ("weight", "bias") if config["attention_bias"] else ("weight",):
            q, k, v = (tensors[f"model.layers.{layer}.self_attn.{name}_proj.{kind}"].split(head) for name in "qkv")
            rows = [part for group in range(groups) for part in (*q[group * shared :][:shared], k[group], v[group])]
            hub[f"model.layers.{layer}.attention.wqkv.{kind}"] = torch.cat(rows)
    return hub


@pytest.mark.parametrize("row", ROWS)
def test_a_pack_equals_a_llama_with_the_same_numbers(row: str, tmp_path: Path, record_parity: Record) -> None:
    llama, internlm2 = save_internlm2(tmp_path, ROWS[row])
    loaded = load(internlm2)
    assert loaded.aside == ("output.weight", "v_head.weight")
    got = packed(loaded.transformer)
    parity = Parity(
        row, "native", "LlamaModel", worst(got, reference(llama, "Llama")), worst(got, alone(loaded.transformer))
    )
    record_parity(parity)
    # Both sides add the same float32 numbers in another order.
    assert parity.error < 1e-5
    assert parity.packing_error < 1e-5


def test_bfloat16_stays_near_transformers(tmp_path: Path) -> None:
    llama, internlm2 = save_internlm2(tmp_path, {})
    got = packed(load(internlm2, torch.bfloat16).transformer)
    # bfloat16 keeps 8 bits: a few last places over three layers with weights ten times larger than real ones.
    assert worst(got, reference(llama, "Llama", torch.bfloat16)) < 6e-2


@pytest.mark.parametrize("changes", [{"num_attention_heads": 3}, {"head_dim": 4}])
def test_a_tensor_that_cannot_hold_the_heads_of_the_config_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    _, internlm2 = save_internlm2(tmp_path, {})
    change_config(internlm2, **changes)
    with pytest.raises(CheckpointError, match=r"64 rows cannot hold \d query heads"):
        load(internlm2)


@pytest.mark.parametrize("tensor", ["layers.1.attention.wqkv", "layers.0.feed_forward.w3", "norm", "tok_embeddings"])
def test_a_missing_tensor_is_named(tensor: str, tmp_path: Path) -> None:
    _, internlm2 = save_internlm2(tmp_path, {})
    change_tensors(internlm2, drop=f"model.{tensor}.weight")
    with pytest.raises(CheckpointError, match=tensor.rpartition(".")[2]):
        load(internlm2)


def test_absent_keys_mean_the_defaults_of_its_config_class() -> None:
    """InternLM2Config has those of Llama."""
    family, llama = family_of({"model_type": "internlm2"}), family_of({"model_type": "llama"})
    assert family is not None
    assert llama is not None
    assert family.spec({}) == llama.spec(transformers.LlamaConfig().to_dict())
    assert family.max_tokens({}) == 2048
    assert family.pooling == "LAST"


@pytest.mark.parametrize("changes", [{"hidden_act": "xielu"}, {"rotary": {"base": 1e4}}, {"sliding_window": 6}])
def test_a_key_that_would_change_numbers_unheeded_is_refused_by_name(changes: dict[str, Any]) -> None:
    family = family_of({"model_type": "internlm2"})
    assert family is not None
    (key,) = changes
    with pytest.raises(NotNative, match=key):
        family.spec(changes)
