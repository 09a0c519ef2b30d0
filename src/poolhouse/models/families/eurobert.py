"""EuroBERT: Llama's blocks, every token seeing both sides."""

from __future__ import annotations

from poolhouse.models.checkpoint import Config
from poolhouse.models.families.family import Family
from poolhouse.models.families.llama import HEADS, NAMES, decoder
from poolhouse.models.spec import TransformerSpec
from poolhouse.models.weights import Layout

_DEFAULTS = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}


def _eurobert(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config, "is_causal": False}
    return decoder(config, [None] * config["num_hidden_layers"])


EUROBERT = Family(
    ("eurobert",),
    _eurobert,
    (Layout(NAMES),),
    pooling="MEAN",
    aside=(*HEADS, r"dense\.(weight|bias)"),
    max_tokens=lambda config: config.get("max_position_embeddings", 8192),
)
