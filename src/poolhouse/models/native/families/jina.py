"""Jina embeddings v3: XLM-RoBERTa with rotary positions, in the hub's layout and in transformers'.

Source of the hub's names: transformers' own conversion table for jina_embeddings_v3.
"""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import activation, rope
from poolhouse.models.native.families.bert import HEADS, roberta_head, roberta_vocabulary_head
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.families.nomic import NATIVE_NAMES
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.weights import Layout, Source


def _jina(config: Config) -> TransformerSpec:
    heads = config.get("num_attention_heads", 16)
    head_dim = config.get("hidden_size", 1024) // heads
    turns = rope({"rope_theta": config.get("rotary_emb_base", 20000.0), **config}, head_dim, 20000.0)
    return TransformerSpec(
        heads=heads,
        head_dim=head_dim,
        layers=(LayerSpec(rope=turns),) * config.get("num_hidden_layers", 24),
        activation=activation(config, "hidden_act", "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-5),
    )


_NATIVE_NAMES = NATIVE_NAMES | {"layers.*.ffn.up": "layers.*.mlp.fc1", "layers.*.ffn.down": "layers.*.mlp.fc2"}
_HUB_NAMES: dict[str, Source] = {
    "tokens": "embeddings.word_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embedding_norm": "emb_ln",
    "layers.*.attn.qkv": "encoder.layers.*.mixer.Wqkv",
    "layers.*.attn.out": "encoder.layers.*.mixer.out_proj",
    "layers.*.attn_post": "encoder.layers.*.norm1",
    "layers.*.ffn.up": "encoder.layers.*.mlp.fc1",
    "layers.*.ffn.down": "encoder.layers.*.mlp.fc2",
    "layers.*.ffn_post": "encoder.layers.*.norm2",
}

# The hub's repositories call themselves xlm-roberta; `family_of` tells them apart by their rotary positions.
JINA = Family(
    ("jina_embeddings_v3", "xlm-roberta-rotary"),
    _jina,
    (Layout(_HUB_NAMES), Layout(_NATIVE_NAMES)),
    pooling="MEAN",
    aside=HEADS,
    max_tokens=lambda config: config.get("max_position_embeddings", 8194),
    sequence_head=roberta_head,
    token_head=token_classifier_head,
    vocabulary_head=lambda config: roberta_vocabulary_head({"layer_norm_eps": 1e-5, **config}),
)
