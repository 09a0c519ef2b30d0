"""DeBERTa v2 and v3; v1 stores its projections otherwise and has no family of its own yet."""

from __future__ import annotations

from typing import get_args

from poolhouse.models.backbone import Backbone
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.deberta import Deberta, DebertaSpec, Term
from poolhouse.models.native.families._config import NotNative, activation, refuse
from poolhouse.models.native.families.bert import EMBEDDINGS, HEADS, LAYERS, bert
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout, Source, Weights

_DEFAULTS = {
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-7,
}


def _spec(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    refuse(config, {"attention_head_size": (None, config["hidden_size"] // config["num_attention_heads"])})
    deberta_spec(config)
    return bert(config)


def deberta_spec(config: Config) -> DebertaSpec:
    """What DeBERTa's config says beyond BERT's, with the defaults of its config class and modelling code."""
    refuse(config, {"conv_groups": (1,)})
    convolved = (config.get("conv_kernel_size") or 0) > 0
    terms = _terms(config)
    longest = config.get("max_relative_positions", -1)
    if longest < 1:
        longest = config.get("max_position_embeddings", 512)
    buckets = config.get("position_buckets", -1)
    return DebertaSpec(
        terms=terms,
        span=buckets if buckets > 0 else longest,
        max_distance=longest if buckets > 0 else None,
        shared=bool(config.get("share_att_key", False)),
        normalised="layer_norm"
        in [name.strip() for name in str(config.get("norm_rel_ebd", "none")).lower().split("|")],
        absolute=bool(config.get("position_biased_input", True)),
        convolution=activation(config, "conv_act", "tanh") if convolved else None,
    )


def _terms(config: Config) -> frozenset[Term]:
    """The products with relative positions: a list, or names between bars."""
    names = config.get("pos_att_type") or []
    if isinstance(names, str):
        names = [name.strip() for name in names.lower().split("|")]
    terms = frozenset(term for term in get_args(Term) if term in names)
    if terms and not config.get("relative_attention", False):
        raise NotNative(f"config.json: pos_att_type is {names}, but relative_attention is not set.")
    if set(names) - terms:
        raise NotNative(f"config.json: pos_att_type is {names}; the native family handles only c2p and p2c.")
    return terms


def _backbone(config: Config, spec: TransformerSpec, weights: Weights) -> Backbone:
    return Deberta(spec, deberta_spec(config), weights)


_NAMES: dict[str, Source] = {
    **EMBEDDINGS,
    "project": "embeddings.embed_proj",
    "relative": "encoder.rel_embeddings",
    "relative_norm": "encoder.LayerNorm",
    "convolution": "encoder.conv.conv",
    "convolution_norm": "encoder.conv.LayerNorm",
    **LAYERS,
    "layers.*.attn.qkv": tuple(f"encoder.layer.*.attention.self.{name}_proj" for name in ("query", "key", "value")),
    "layers.*.attn.position_key": "encoder.layer.*.attention.self.pos_key_proj",
    "layers.*.attn.position_query": "encoder.layer.*.attention.self.pos_query_proj",
}
_OPTIONAL = frozenset(
    (
        *("positions", "types", "project", "relative", "relative_norm", "convolution", "convolution_norm"),
        *("layers.*.attn.position_key", "layers.*.attn.position_query"),
    )
)


def _sequence_head(config: Config) -> Head:
    name = activation(config, "pooler_hidden_act", "gelu")
    return Head((HeadModule("pooler.dense", name), HeadModule("classifier")))


def _vocabulary_head(config: Config) -> Head:
    """A transform, then a product with the table of tokens; under BERT's names or the names of the original files."""
    old, new = "cls.predictions", "lm_predictions.lm_head"
    modules = (
        HeadModule(f"{old}.transform.dense", activation(config, "hidden_act", "gelu"), also=(f"{new}.dense",)),
        HeadModule(
            f"{old}.transform.LayerNorm",
            kind="norm",
            eps=config.get("layer_norm_eps", 1e-7),
            also=(f"{new}.LayerNorm",),
        ),
        HeadModule(f"{old}.decoder", also=(new,), bias=f"{old}.bias", tied=config.get("tie_word_embeddings", True)),
    )
    return Head(modules, pooling=None)


DEBERTA = Family(
    ("deberta-v2",),
    _spec,
    (Layout(_NAMES, optional=_OPTIONAL),),
    aside=(*HEADS, r"(lm|mask)_predictions\.[\w.]*(weight|bias)", r"lm_head\.[\w.]*(weight|bias)"),
    max_tokens=lambda config: config.get("max_position_embeddings", 512),
    backbone=_backbone,
    attends_to_part=False,
    # Known to overflow: microsoft/mdeberta-v3-base gives NaN in float16.
    float16=False,
    sequence_head=_sequence_head,
    token_head=token_classifier_head,
    vocabulary_head=_vocabulary_head,
)
