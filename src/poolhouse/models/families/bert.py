"""BERT and its kin, which differ in names and in where positions start."""

from __future__ import annotations

from poolhouse.models.checkpoint import Config
from poolhouse.models.families._config import activation, refuse
from poolhouse.models.families.family import Family
from poolhouse.models.spec import LayerSpec, TransformerSpec
from poolhouse.models.weights import Layout

_ABSOLUTE = {"position_embedding_type": ("absolute", None), "is_decoder": (False,), "add_cross_attention": (False,)}


def _bert(config: Config) -> TransformerSpec:
    return _spec(config, position_offset=0)


def _roberta(config: Config) -> TransformerSpec:
    return _spec(config, position_offset=config.get("pad_token_id", 1) + 1)


def _spec(config: Config, position_offset: int) -> TransformerSpec:
    refuse(config, _ABSOLUTE)
    heads = config.get("num_attention_heads", 12)
    return TransformerSpec(
        heads=heads,
        head_dim=config.get("hidden_size", 768) // heads,
        layers=(LayerSpec(),) * config.get("num_hidden_layers", 12),
        activation=activation(config, "hidden_act", "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        position_offset=position_offset,
    )


EMBEDDINGS = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
}
_LAYERS = {
    "layers.*.attn.qkv": tuple(f"encoder.layer.*.attention.self.{name}" for name in ("query", "key", "value")),
    "layers.*.attn.out": "encoder.layer.*.attention.output.dense",
    "layers.*.attn_post": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.ffn.up": "encoder.layer.*.intermediate.dense",
    "layers.*.ffn.down": "encoder.layer.*.output.dense",
    "layers.*.ffn_post": "encoder.layer.*.output.LayerNorm",
}
HEADS = (r"pooler\..*", r"cls\..*", r"lm_head\..*", r"classifier\..*", r"embeddings\.(position_ids|token_type_ids)")

_LAYOUT = Layout(EMBEDDINGS | _LAYERS)

BERT = Family(("bert",), _bert, (_LAYOUT,), aside=HEADS)
ROBERTA = Family(
    ("roberta", "xlm-roberta", "camembert"),
    _roberta,
    (_LAYOUT,),
    aside=HEADS,
    # Two rows of the table come before the first token.
    max_tokens=lambda config: config.get("max_position_embeddings", 512) - config.get("pad_token_id", 1) - 1,
)
