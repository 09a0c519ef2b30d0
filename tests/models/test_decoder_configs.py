"""What decoder families read in a config.json: defaults, older words, and keys that they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from poolhouse.models.native.families import family_of
from poolhouse.models.native.families._config import NotNative

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text"])
def test_absent_keys_mean_the_defaults_of_transformers(name: str) -> None:
    config = getattr(transformers, f"{name}Config")().to_dict()
    family = family_of(config)
    assert family is not None
    assert family.spec({}) == family.spec(config)
    assert family.max_tokens({}) == config["max_position_embeddings"]
    assert family.pooling == "LAST"


OLDER_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "pretraining_tp": 2}),
    "mistral": ("Mistral", {"rope_theta": 1e6, "sliding_window": 6, "head_dim": None}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen2, window switched off": ("Qwen2", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "gemma": ("Gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    "gemma2": ("Gemma2", {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 6, "cache_implementation": "hybrid"}),
    "gemma3": ("Gemma3Text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 2}),
    "gemma3, stretched": ("Gemma3Text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
}


@pytest.mark.parametrize("row", OLDER_FILES)
def test_older_files_mean_what_transformers_reads_in_them(row: str) -> None:
    name, older = OLDER_FILES[row]
    config = getattr(transformers, f"{name}Config")(**TINY | older).to_dict()
    family = family_of(config)
    assert family is not None
    assert family.spec(TINY | older) == family.spec(config)


def test_older_gemma3_files_name_two_bases_and_stretch_one() -> None:
    family = family_of({"model_type": "gemma3_text"})
    assert family is not None
    older = OLDER_FILES["gemma3"][1] | OLDER_FILES["gemma3, stretched"][1]
    near, whole = family.spec(TINY | older | {"sliding_window": 6}).layers[:2]
    assert near.rope is not None
    assert whole.rope is not None
    assert (near.window, near.rope.theta, near.rope.scaling) == (5, 2e4, "default")
    assert (whole.window, whole.rope.theta, whole.rope.scaling, whole.rope.factor) == (None, 5e5, "linear", 8.0)


def test_the_window_of_embeddinggemma_is_half_of_what_its_file_says() -> None:
    family = family_of({"model_type": "gemma3_text"})
    assert family is not None
    spec = family.spec({"sliding_window": 512, "use_bidirectional_attention": True})
    assert not spec.causal
    assert {layer.window for layer in spec.layers} == {256, None}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"hidden_act": "xielu"}),
        ("llama", {"sliding_window": 6}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_scaling": {"rope_type": "proportional"}}),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen2", {"layer_types": ["chunked_attention"] * 32}),
        ("qwen3", {"layer_types": ["sliding_attention"] * 32}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
    ],
)
def test_a_key_that_would_change_numbers_unheeded_is_refused_by_name(model_type: str, changes: dict[str, Any]) -> None:
    family = family_of({"model_type": model_type})
    assert family is not None
    (key,) = changes
    with pytest.raises(NotNative, match="rope type" if key == "rope_scaling" else key):
        family.spec(changes)
