"""Jina embeddings v2: BERT with ALiBi in place of positions and a gated feed-forward; the hub calls it bert.

Source of names and formulas: the hub's own model code, jinaai/jina-bert-implementation.
"""

from __future__ import annotations

from dataclasses import replace

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import pooling, refuse
from poolhouse.models.native.families.bert import EMBEDDINGS, HEADS, LAYERS, bert
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout, Source

_ACTIVATIONS = {"geglu": "gelu", "reglu": "relu"}


def _jina_v2(config: Config) -> TransformerSpec:
    refuse(config, {"feed_forward_type": tuple(_ACTIVATIONS)})
    kind = config.get("feed_forward_type", "geglu")
    spec = bert({**config, "position_embedding_type": "absolute"})
    return replace(spec, activation=_ACTIVATIONS[kind], gated=True, alibi=True)


_NAMES: dict[str, Source] = {
    **{slot: theirs for slot, theirs in EMBEDDINGS.items() if slot != "positions"},
    **LAYERS,
    "layers.*.ffn.up": "encoder.layer.*.mlp.gated_layers",
    "layers.*.ffn.down": "encoder.layer.*.mlp.wo",
    "layers.*.ffn_post": "encoder.layer.*.mlp.layernorm",
}

JINA_V2 = Family(
    ("bert-alibi",),
    _jina_v2,
    (Layout(_NAMES),),
    pooling="MEAN",
    stated_pooling=lambda config: pooling(config, "emb_pooler"),
    aside=HEADS,
    max_tokens=lambda config: config.get("max_position_embeddings", 512),
)
