"""Native decoder families against transformers, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from poolhouse.batch import Batch
from poolhouse.errors import CheckpointError
from poolhouse.layers.norm import NormKind, RMSNorm
from poolhouse.models.checkpoint import Checkpoint
from poolhouse.models.families import family_of
from poolhouse.models.native import Loaded, load_transformer
from poolhouse.tokens import Tokens

# Grouped heads everywhere. Windows below are shorter than most texts, and 30 passes every `original` length of 16.
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 99,
}
LENGTHS = (3, 17, 1, 30, 12, 30)
MIXED = ["sliding_attention", "full_attention"] * 2
BOTH_SIDES = {"use_bidirectional_attention": True}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one kv head": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama, both sides": ("Llama", {"is_causal": False}),
    "mistral, window": ("Mistral", {"sliding_window": 6}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "mistral, window on both sides": ("Mistral", {"sliding_window": 6, "is_causal": False}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window in the last layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2, layer types": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "layer_types": MIXED}),
    "qwen2, both sides": ("Qwen2", {"is_causal": False}),
    "qwen3": ("Qwen3", {}),
    "qwen3, window on both sides": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "is_causal": False},
    ),
    "gemma": ("Gemma", {}),
    "gemma, first files": ("Gemma", {"hidden_act": "gelu"}),
    "gemma, both sides": ("Gemma", BOTH_SIDES),
    "gemma2": ("Gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "gemma2, no softcap": ("Gemma2", {"sliding_window": 6, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", {"sliding_window": 6, "query_pre_attn_scalar": 16, "layer_types": MIXED}),
    "gemma3, both sides": ("Gemma3Text", {"sliding_window": 8, "layer_types": MIXED, **BOTH_SIDES}),
    "gemma3, odd window on both sides": ("Gemma3Text", {"sliding_window": 9, **BOTH_SIDES}),
    "gemma3, not causal": ("Gemma3Text", {"sliding_window": 6, "layer_types": MIXED, "is_causal": False}),
}
LONG = {"original_max_position_embeddings": 16}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **LONG},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, **LONG},
    "yarn, every key": {
        "rope_type": "yarn",
        "factor": 4.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        **LONG,
    },
    "longrope": {"rope_type": "longrope", "factor": 2.0, **FACTORS, **LONG},
    "longrope, factor by lengths": {"rope_type": "longrope", **FACTORS, **LONG},
    "longrope, attention factor": {"rope_type": "longrope", "attention_factor": 1.3, **FACTORS, **LONG},
}


@pytest.mark.parametrize("row", ROWS)
def test_a_pack_equals_transformers_one_by_one(row: str, tmp_path: Path) -> None:
    name, options = ROWS[row]
    save(tmp_path, name, options)
    # Both sides add the same float32 numbers in another order: 6e-7 at most was seen.
    assert worst(packed(load(tmp_path).transformer), reference(tmp_path, name)) < 1e-5


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scalings_equal_transformers(scaling: str, tmp_path: Path) -> None:
    rope = SCALINGS[scaling]
    longest = 16 if scaling == "dynamic" else 64
    save(tmp_path, "Llama", {"max_position_embeddings": longest, "rope_parameters": {"rope_theta": 10000.0, **rope}})
    transformer = load(tmp_path).transformer
    assert worst(packed(transformer), reference(tmp_path, "Llama")) < 1e-5
    assert worst(packed(transformer), alone(transformer)) < 1e-5

    # The same in the words of older files.
    config = json.loads((tmp_path / "config.json").read_text())
    new = family_of("llama").spec(config)  # type: ignore[union-attr]
    older = dict(rope)
    config |= {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": older | {"type": older.pop("rope_type")}}
    assert family_of("llama").spec(config) == new  # type: ignore[union-attr]


@pytest.mark.parametrize("row", ["mistral, window", "qwen3", "gemma2", "gemma3, both sides"])
def test_a_pack_equals_each_text_alone(row: str, tmp_path: Path) -> None:
    save(tmp_path, *ROWS[row])
    transformer = load(tmp_path).transformer
    assert worst(packed(transformer), alone(transformer)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [("rms", "llama.modeling_llama.LlamaRMSNorm"), ("rms_plus_1", "gemma3.modeling_gemma3.Gemma3RMSNorm")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_order_of_casts_in_a_norm_is_that_of_transformers(kind: NormKind, theirs: str, dtype: torch.dtype) -> None:
    module, name = theirs.rsplit(".", 1)
    norm = getattr(pytest.importorskip(f"transformers.models.{module}"), name)(64, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(200, 64, dtype=dtype)
    # No tolerance: the other order changes a quarter of these numbers.
    with torch.inference_mode():
        assert torch.equal(RMSNorm(norm.weight.detach(), 1e-6, kind)(x), norm(x))


@pytest.mark.parametrize("row", ["llama", "qwen3", "gemma", "gemma2", "gemma3"])
def test_half_types_stay_near_transformers(row: str, tmp_path: Path) -> None:
    name, options = ROWS[row]
    save(tmp_path, name, options)
    # bfloat16 keeps 8 bits: a few last places over four layers (3e-2 was seen, where residuals are added in one pass).
    for dtype, tolerance in ((torch.bfloat16, 6e-2), (torch.float16, 8e-3)):
        got = packed(load(tmp_path, dtype).transformer)
        assert got[0].dtype == dtype
        assert worst(got, reference(tmp_path, name, dtype)) < tolerance


@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("LlamaForCausalLM", {}, "lm_head.weight"),
        ("MistralForCausalLM", {"tie_word_embeddings": True}, None),
        ("Qwen2ForSequenceClassification", {"pad_token_id": 0}, "score.weight"),
        ("Qwen3ForTokenClassification", {}, "score.weight"),
        ("Gemma2ForCausalLM", {}, None),
        ("Gemma3ForCausalLM", {}, None),
    ],
)
def test_a_checkpoint_with_a_head_gives_its_backbone(
    name: str, options: dict[str, Any], head: str | None, tmp_path: Path
) -> None:
    family = name.partition("For")[0].replace("Gemma3", "Gemma3Text")
    save(tmp_path, family, options, model=name)
    loaded = load(tmp_path)
    assert [name for name in loaded.aside if name.endswith("weight")] == ([head] if head else [])
    assert worst(packed(loaded.transformer), reference(tmp_path, family)) < 1e-5


def test_frequencies_that_old_files_store_are_set_aside(tmp_path: Path) -> None:
    save(tmp_path, "Llama", {}, model="LlamaForCausalLM")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path, add={name: torch.ones(4), "v_head.summary.weight": torch.ones(1, 32)})
    assert load(tmp_path).aside == ("lm_head.weight", name, "v_head.summary.weight")


@pytest.mark.parametrize("tensor", ["layers.1.mlp.gate_proj.weight", "layers.2.self_attn.k_norm.weight", "norm.weight"])
def test_a_missing_tensor_is_named(tensor: str, tmp_path: Path) -> None:
    save(tmp_path, "Qwen3", {})
    change_tensors(tmp_path, drop=tensor)
    with pytest.raises(CheckpointError, match=tensor.split(".")[-2]):
        load(tmp_path)


@pytest.mark.parametrize("tensor", ["layers.0.self_attn.q_norm.weight", "linear.weight", "xlm_head.weight"])
def test_an_unknown_tensor_is_named(tensor: str, tmp_path: Path) -> None:
    save(tmp_path, "Llama", {})
    change_tensors(tmp_path, add={tensor: torch.ones(8)})
    with pytest.raises(CheckpointError, match=tensor):
        load(tmp_path)


def test_bidirectional_llama_sees_both_sides_and_takes_the_mean(tmp_path: Path) -> None:
    save(tmp_path, "Llama", {"is_causal": False})
    expected = packed(load(tmp_path).transformer)
    for changes in (
        {"model_type": "llama_bidirec", "pooling": "avg"},
        {"architectures": ["LlamaBidirectionalModel"]},
        {"use_bidirectional_attention": True},
    ):
        change_config(tmp_path, is_causal=None, **changes)
        assert worst(packed(load(tmp_path).transformer), expected) == 0
    assert family_of("llama_bidirec").pooling == "MEAN"  # type: ignore[union-attr]


def save(folder: Path, family: str, options: dict[str, Any], model: str | None = None) -> None:
    """A tiny random checkpoint with weights large enough that every part of a block matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY | options)
    made = getattr(transformers, model or f"{family}Model")(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, drop: str | None = None, add: dict[str, Tensor] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(drop or "", None)
    save_file(tensors | (add or {}), folder / "model.safetensors")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Loaded:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config["model_type"])
    assert family is not None
    return load_transformer(family, checkpoint.config, checkpoint, dtype, torch.device("cpu"))


def texts() -> list[Tokens]:
    random = np.random.default_rng(0)
    return [Tokens(random.integers(5, 99, length)) for length in LENGTHS]


def packed(transformer: torch.nn.Module) -> list[Tensor]:
    return list(transformer(Batch.pack(texts())).split(LENGTHS))


def alone(transformer: torch.nn.Module) -> list[Tensor]:
    return [transformer(Batch.pack([text])) for text in texts()]


def reference(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    model = getattr(transformers, f"{family}Model").from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(text.ids)[None]).last_hidden_state[0] for text in texts()]


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference in any text, relative to the largest number expected there."""
    pairs = zip(got, expected, strict=True)
    return max(float((g.float() - e.float()).abs().max() / e.float().abs().max()) for g, e in pairs)
