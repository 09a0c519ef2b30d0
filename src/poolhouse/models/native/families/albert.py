"""ALBERT: one set of weights for all layers, and narrow embeddings that are projected."""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.families._config import activation, refuse
from poolhouse.models.native.families.bert import EMBEDDINGS, bert, to_vocabulary
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout, Source


def _albert(config: Config) -> TransformerSpec:
    refuse(config, {"num_hidden_groups": (1,), "inner_group_num": (1,)})
    defaults = {"hidden_size": 4096, "num_attention_heads": 64, "hidden_act": "gelu_new"}
    return bert({**defaults, **config})


def _vocabulary_head(config: Config) -> Head:
    act = activation(config, "hidden_act", "gelu_new")
    return to_vocabulary(
        config, "predictions.dense", act, ("predictions.LayerNorm",), "predictions.decoder", "predictions.bias"
    )


_SHARED = "encoder.albert_layer_groups.0.albert_layers.0."
_NAMES: dict[str, Source] = {
    **EMBEDDINGS,
    "project": "encoder.embedding_hidden_mapping_in",
    "layers.shared.attn.qkv": tuple(f"{_SHARED}attention.{name}" for name in ("query", "key", "value")),
    "layers.shared.attn.out": f"{_SHARED}attention.dense",
    "layers.shared.attn_post": f"{_SHARED}attention.LayerNorm",
    "layers.shared.ffn.up": f"{_SHARED}ffn",
    "layers.shared.ffn.down": f"{_SHARED}ffn_output",
    "layers.shared.ffn_post": f"{_SHARED}full_layer_layer_norm",
}

ALBERT = Family(
    ("albert",),
    _albert,
    (Layout(_NAMES),),
    aside=(
        r"pooler\.(weight|bias)",
        r"predictions\.(bias|(LayerNorm|dense|decoder)\.(weight|bias))",
        r"sop_classifier\.classifier\.(weight|bias)",
        r"classifier\.(weight|bias)",
        r"embeddings\.position_ids",
    ),
    max_tokens=lambda config: config.get("max_position_embeddings", 512),
    sequence_head=lambda _: Head((HeadModule("pooler", "tanh"), HeadModule("classifier"))),
    token_head=token_classifier_head,
    vocabulary_head=_vocabulary_head,
)
