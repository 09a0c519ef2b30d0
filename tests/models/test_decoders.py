"""Native decoder families against transformers, one text at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from poolhouse.errors import CheckpointError
from poolhouse.layers.adapted import AdaptedLinear, LowRank
from poolhouse.layers.feed_forward import FeedForward
from poolhouse.layers.norm import NormKind, RMSNorm
from poolhouse.models.native.families import family_of
from poolhouse.packing.pack import Batch, Read, Segments
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
def test_a_pack_equals_transformers_one_by_one(row: str, tmp_path: Path, record_parity: Record) -> None:
    name, options = ROWS[row]
    save(tmp_path, name, TINY | options)
    transformer = load(tmp_path).transformer
    got = packed(transformer)
    parity = Parity(
        row, "native", name + "Model", worst(got, reference(tmp_path, name)), worst(got, alone(transformer))
    )
    record_parity(parity)
    # Both sides add the same float32 numbers in another order: 6e-7 at most was seen.
    assert parity.error < 1e-5
    assert parity.packing_error < 1e-5


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scalings_equal_transformers(scaling: str, tmp_path: Path) -> None:
    rope = SCALINGS[scaling]
    longest = 16 if scaling == "dynamic" else 64
    save(
        tmp_path,
        "Llama",
        TINY | {"max_position_embeddings": longest, "rope_parameters": {"rope_theta": 10000.0, **rope}},
    )
    transformer = load(tmp_path).transformer
    assert worst(packed(transformer), reference(tmp_path, "Llama")) < 1e-5
    assert worst(packed(transformer), alone(transformer)) < 1e-5

    # The same in the words of older files.
    config = json.loads((tmp_path / "config.json").read_text())
    new = family_of({"model_type": "llama"}).spec(config)  # type: ignore[union-attr]
    older = dict(rope)
    config |= {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": older | {"type": older.pop("rope_type")}}
    assert family_of({"model_type": "llama"}).spec(config) == new  # type: ignore[union-attr]


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
    save(tmp_path, name, TINY | options)
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
    save(tmp_path, family, TINY | options, model=name)
    loaded = load(tmp_path)
    assert [name for name in loaded.aside if name.endswith("weight")] == ([head] if head else [])
    assert worst(packed(loaded.transformer), reference(tmp_path, family)) < 1e-5


def test_frequencies_that_old_files_store_are_set_aside(tmp_path: Path) -> None:
    save(tmp_path, "Llama", TINY | {}, model="LlamaForCausalLM")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path, add={name: torch.ones(4), "v_head.summary.weight": torch.ones(1, 32)})
    assert load(tmp_path).aside == ("lm_head.weight", name, "v_head.summary.weight")


@pytest.mark.parametrize("tensor", ["layers.1.mlp.gate_proj.weight", "layers.2.self_attn.k_norm.weight", "norm.weight"])
def test_a_missing_tensor_is_named(tensor: str, tmp_path: Path) -> None:
    save(tmp_path, "Qwen3", TINY | {})
    change_tensors(tmp_path, drop=tensor)
    with pytest.raises(CheckpointError, match=tensor.split(".")[-2]):
        load(tmp_path)


@pytest.mark.parametrize("tensor", ["layers.0.self_attn.q_norm.weight", "linear.weight", "xlm_head.weight"])
def test_an_unknown_tensor_is_named(tensor: str, tmp_path: Path) -> None:
    save(tmp_path, "Llama", TINY | {})
    change_tensors(tmp_path, add={tensor: torch.ones(8)})
    with pytest.raises(CheckpointError, match=tensor):
        load(tmp_path)


def test_bidirectional_llama_sees_both_sides_and_takes_the_mean(tmp_path: Path) -> None:
    save(tmp_path, "Llama", TINY | {"is_causal": False})
    expected = packed(load(tmp_path).transformer)
    for changes in (
        {"model_type": "llama_bidirec", "pooling": "avg"},
        {"architectures": ["LlamaBidirectionalModel"]},
        {"use_bidirectional_attention": True},
    ):
        change_config(tmp_path, is_causal=None, **changes)
        assert worst(packed(load(tmp_path).transformer), expected) == 0
    assert family_of({"model_type": "llama_bidirec"}).pooling == "MEAN"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen3", "Gemma2", "Bert", "ModernBert", "Roberta", "Albert", "adapter", "mixed layers"]
)
def test_rows_that_are_read_alone_equal_those_of_the_whole_answer(name: str, tmp_path: Path) -> None:
    family = {"adapter": "Llama", "mixed layers": "Bert"}.get(name, name)
    options = TINY if family in ("Llama", "Qwen3", "Gemma2") else TINY | {"head_dim": None, "pad_token_id": 0}
    save(tmp_path, family, options)
    transformer = load(tmp_path).transformer
    adapters = None
    if name == "adapter":
        adapters = [None, "law", None, "law", "law", None]
        change = LowRank(torch.randn(32, 2), torch.randn(2, 48))
        for layer in transformer.layers:
            assert isinstance(layer.feed_forward, FeedForward)
            down = AdaptedLinear(layer.feed_forward.down)
            down.changes["law"] = change
            layer.feed_forward.down = down
    if name == "mixed layers":
        transformer.mix_layers(1, (0.5, 0.2, 0.3, 0.1))
    batch = Batch.pack(texts(), adapters=adapters)
    whole = transformer(batch)
    for rows in (batch.segments.starts_tensor, batch.segments.last_tensor):
        read = Read(rows, Segments((1,) * len(rows), adapters=adapters))
        got = transformer(replace(batch, read=read))
        assert got.shape == (len(rows), 32)
        assert (got - whole[rows]).abs().max() < 1e-5 * whole.abs().max()
