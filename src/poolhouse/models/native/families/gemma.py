"""Gemma 1 and 2: scaled embeddings, norm weights stored as offsets from 1."""

from __future__ import annotations

from dataclasses import replace

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import activation, refuse
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.families.llama import HEADS, NAMES, decoder, windows
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout

# From Gemma 2 on, each half of a block is normed before and after.
SANDWICH = NAMES | {
    "layers.*.attn_out": "layers.*.post_attention_layernorm",
    "layers.*.ffn_in": "layers.*.pre_feedforward_layernorm",
    "layers.*.ffn_out": "layers.*.post_feedforward_layernorm",
}
_DEFAULTS = {
    "hidden_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "max_position_embeddings": 8192,
}
_DEFAULTS_2 = {
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
}


def _gemma(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    # The first files say "gelu" and mean its approximation by tanh.
    name = config.get("hidden_act", "gelu_pytorch_tanh")
    config["hidden_activation"] = "gelu_pytorch_tanh" if name == "gelu" else name
    return gemma(config, [None] * config["num_hidden_layers"])


def _gemma2(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS_2, **config}
    # transformers' own attention paths disagree on what this key does to Gemma 2.
    refuse(config, {"use_bidirectional_attention": (None, False)})
    spec = gemma(config, windows(config, lambda layer: layer % 2 == 0))
    return replace(
        spec,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        softcap=config["attn_logit_softcapping"],
    )


def gemma(config: Config, windows: list[int | None]) -> TransformerSpec:
    """What all Gemmas share."""
    spec = decoder(config, windows, head_dim=256)
    return replace(
        spec,
        activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        norm="rms_plus_1",
        embedding_scale=config["hidden_size"] ** 0.5,
    )


def _max_tokens(config: Config) -> int:
    return int(config.get("max_position_embeddings", 8192))


GEMMA = Family(("gemma",), _gemma, (Layout(NAMES),), pooling="LAST", aside=HEADS, max_tokens=_max_tokens, float16=False)
GEMMA2 = Family(
    ("gemma2",), _gemma2, (Layout(SANDWICH),), pooling="LAST", aside=HEADS, max_tokens=_max_tokens, float16=False
)
