"""Gemma 3's text model: norms on query and key, and a rope for each kind of layer."""

from __future__ import annotations

from dataclasses import replace

from poolhouse.layers.positions import RopeSpec
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import refuse, rope
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.families.gemma import SANDWICH, gemma
from poolhouse.models.native.families.llama import HEADS, QK_NORMS, windows
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout

_DEFAULTS = {
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}


def _gemma3(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    refuse(config, {"attn_logit_softcapping": (None,)})
    if config.get("use_bidirectional_attention") and config["sliding_window"]:
        # Files of two-sided models state the full width: half of it lies on each side.
        config["sliding_window"] = config["sliding_window"] // 2
    every = config.get("sliding_window_pattern", 6)
    seen = windows(config, lambda layer: (layer + 1) % every != 0)
    spec = gemma({**config, "rope_parameters": None, "rope_scaling": None}, seen)
    whole, near = _ropes(config, spec.head_dim)
    return replace(
        spec,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        layers=tuple(
            replace(layer, rope=near if window else whole) for layer, window in zip(spec.layers, seen, strict=True)
        ),
    )


def _ropes(config: Config, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """Of layers that see everything and of layers with a window; older files name two bases instead of two ropes."""
    ropes = config.get("rope_parameters") or {}
    whole = {**config, "rope_parameters": ropes.get("full_attention")}
    near = {
        **config,
        "rope_parameters": ropes.get("sliding_attention"),
        "rope_scaling": None,
        "rope_theta": config.get("rope_local_base_freq", 10000.0),
    }
    return rope(whole, head_dim, 1000000.0), rope(near, head_dim, 10000.0)


GEMMA3 = Family(
    ("gemma3_text",),
    _gemma3,
    (Layout(SANDWICH | QK_NORMS),),
    pooling="LAST",
    aside=HEADS,
    max_tokens=lambda config: config.get("max_position_embeddings", 131072),
    float16=False,
)
