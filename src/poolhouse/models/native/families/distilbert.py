"""DistilBERT: BERT without token types, under names of its own."""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.families._config import activation, refuse
from poolhouse.models.native.families.bert import EMBEDDINGS, to_vocabulary
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.weights import Layout, Source


def _distilbert(config: Config) -> TransformerSpec:
    refuse(config, {"sinusoidal_pos_embds": (False,)})
    heads = config.get("n_heads", 12)
    return TransformerSpec(
        heads=heads,
        head_dim=config.get("dim", 768) // heads,
        layers=(LayerSpec(),) * config.get("n_layers", 6),
        activation=activation(config, "activation", "gelu"),
        norm_eps=1e-12,
    )


def _vocabulary_head(config: Config) -> Head:
    act = activation(config, "activation", "gelu")
    return to_vocabulary(config, "vocab_transform", act, ("vocab_layer_norm",), "vocab_projector")


_LAYER = "transformer.layer.*."
_NAMES: dict[str, Source] = {
    **{slot: theirs for slot, theirs in EMBEDDINGS.items() if slot != "types"},
    "layers.*.attn.qkv": tuple(f"{_LAYER}attention.{name}_lin" for name in "qkv"),
    "layers.*.attn.out": f"{_LAYER}attention.out_lin",
    "layers.*.attn_post": f"{_LAYER}sa_layer_norm",
    "layers.*.ffn.up": f"{_LAYER}ffn.lin1",
    "layers.*.ffn.down": f"{_LAYER}ffn.lin2",
    "layers.*.ffn_post": f"{_LAYER}output_layer_norm",
}

DISTILBERT = Family(
    ("distilbert",),
    _distilbert,
    (Layout(_NAMES),),
    aside=(r"(vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier|classifier|qa_outputs)\.(weight|bias)",),
    max_tokens=lambda config: config.get("max_position_embeddings", 512),
    sequence_head=lambda _: Head((HeadModule("pre_classifier", "relu"), HeadModule("classifier"))),
    token_head=token_classifier_head,
    vocabulary_head=_vocabulary_head,
)
