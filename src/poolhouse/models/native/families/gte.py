"""GTE ("new"): BERT with rotary positions and a gated feed-forward, in the hub's layout and in transformers'.

Source of the hub's names: transformers' own conversion table for gte; of its NTK scaling: the hub's model code.
"""

from __future__ import annotations

from poolhouse.layers.positions import RopeSpec
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import activation, refuse, rope
from poolhouse.models.native.families.bert import HEADS, pooler_head, roberta_vocabulary_head
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.families.nomic import NATIVE_NAMES
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.weights import Layout, Reordered, Source


def _gte(config: Config) -> TransformerSpec:
    refuse(
        config,
        {
            "position_embedding_type": ("rope",),
            "layer_norm_type": ("layer_norm",),
            "logn_attention_scale": (False,),
            "logn_attention_clip1": (False,),
        },
    )
    heads = config.get("num_attention_heads", 12)
    head_dim = config.get("hidden_size", 768) // heads
    theta = 160000.0 if config["model_type"] == "gte" else 10000.0
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type") == "ntk":
        turns = _ntk(config, head_dim, theta, float(scaling["factor"]), scaling)
    else:
        turns = rope(config, head_dim, theta)
    return TransformerSpec(
        heads=heads,
        head_dim=head_dim,
        layers=(LayerSpec(rope=turns),) * config.get("num_hidden_layers", 12),
        activation=activation(config, "hidden_act", "gelu"),
        gated=True,
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )


def _ntk(config: Config, head_dim: int, theta: float, factor: float, scaling: Config) -> RopeSpec:
    """The hub code's fixed NTK scaling: a longer base, and all wavelengths longer by factor ** (2 / dim)."""
    refuse(scaling, {"mixed_b": (None,)})
    return RopeSpec(head_dim, float(config.get("rope_theta", theta)) * factor, "linear", factor ** (2 / head_dim))


_HUB_NAMES: dict[str, Source] = {
    "tokens": "embeddings.word_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layers.*.attn.qkv": "encoder.layer.*.attention.qkv_proj",
    "layers.*.attn.out": "encoder.layer.*.attention.o_proj",
    "layers.*.attn_post": "encoder.layer.*.attn_ln",
    # The hub stores up before gate.
    "layers.*.ffn.up": Reordered("encoder.layer.*.mlp.up_gate_proj", (1, 0)),
    "layers.*.ffn.down": "encoder.layer.*.mlp.down_proj",
    "layers.*.ffn_post": "encoder.layer.*.mlp_ln",
}

GTE = Family(
    ("new", "gte"),
    _gte,
    (Layout(_HUB_NAMES, optional=frozenset({"types"})), Layout(NATIVE_NAMES, optional=frozenset({"types"}))),
    aside=(*HEADS, r"lm_head\.(norm|layer_norm)\.(weight|bias)"),
    max_tokens=lambda config: config.get("max_position_embeddings", 8192),
    sequence_head=pooler_head,
    token_head=token_classifier_head,
    vocabulary_head=roberta_vocabulary_head,
)
