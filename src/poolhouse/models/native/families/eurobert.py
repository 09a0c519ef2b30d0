"""EuroBERT: Llama's blocks, every token seeing both sides."""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.families._config import NotNative
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.families.llama import HEADS, NAMES, decoder
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout

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


_POOLINGS = {"bos": "CLS", "mean": "MEAN", "late": "MEAN"}


def _sequence_head(config: Config) -> Head:
    mode = config.get("classifier_pooling", "late")
    if mode not in _POOLINGS:
        raise NotNative(f"config.json: classifier_pooling is {mode!r}, which is not among {sorted(_POOLINGS)}.")
    modules = (HeadModule("dense", "gelu"), HeadModule("classifier"))
    return Head(modules, _POOLINGS[mode], fixed=True, late=mode == "late")


def _vocabulary_head(config: Config) -> Head:
    return Head((HeadModule("lm_head", tied=config.get("tie_word_embeddings", False)),), pooling=None)


EUROBERT = Family(
    ("eurobert",),
    _eurobert,
    (Layout(NAMES),),
    pooling="MEAN",
    aside=(*HEADS, r"dense\.(weight|bias)"),
    max_tokens=lambda config: config.get("max_position_embeddings", 8192),
    sequence_head=_sequence_head,
    token_head=token_classifier_head,
    vocabulary_head=_vocabulary_head,
)
