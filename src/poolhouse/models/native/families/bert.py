"""BERT, RoBERTa and models like them, which differ in names and in where positions start."""

from __future__ import annotations

from dataclasses import replace

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.families._config import activation, refuse
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.weights import Layout, Source


def bert(config: Config) -> TransformerSpec:
    """BERT's behaviour, with the defaults of its config class."""
    return _spec(config, position_offset=0)


def roberta(config: Config) -> TransformerSpec:
    """BERT's behaviour with positions that start behind the pad id."""
    return replace(_spec(config, position_offset=_pad_id(config) + 1), uncounted=_pad_id(config))


def from_pad_id(config: Config) -> int:
    """Positions left when the first pad id + 1 rows of the table come before the first token."""
    positions: int = config.get("max_position_embeddings", 512)
    return positions - _pad_id(config) - 1


def _pad_id(config: Config) -> int:
    pad_id: int = config.get("pad_token_id", 1)
    return pad_id


def _spec(config: Config, position_offset: int) -> TransformerSpec:
    refuse(
        config,
        {"position_embedding_type": ("absolute", None), "is_decoder": (False,), "add_cross_attention": (False,)},
    )
    heads = config.get("num_attention_heads", 12)
    return TransformerSpec(
        heads=heads,
        head_dim=config.get("hidden_size", 768) // heads,
        layers=(LayerSpec(),) * config.get("num_hidden_layers", 12),
        activation=activation(config, "hidden_act", "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        position_offset=position_offset,
    )


EMBEDDINGS: dict[str, Source] = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
}
LAYERS: dict[str, Source] = {
    "layers.*.attn.qkv": tuple(f"encoder.layer.*.attention.self.{name}" for name in ("query", "key", "value")),
    "layers.*.attn.out": "encoder.layer.*.attention.output.dense",
    "layers.*.attn_post": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.ffn.up": "encoder.layer.*.intermediate.dense",
    "layers.*.ffn.down": "encoder.layer.*.output.dense",
    "layers.*.ffn_post": "encoder.layer.*.output.LayerNorm",
}
HEADS = (
    r"pooler\.dense\.(weight|bias)",
    r"cls\.(predictions|seq_relationship)\.[\w.]*(weight|bias)",
    r"lm_head\.(bias|(dense|layer_norm|decoder)\.(weight|bias))",
    r"classifier\.((dense|out_proj)\.)?(weight|bias)",
    r"qa_outputs\.(weight|bias)",
    r"embeddings\.(position_ids|token_type_ids)",
)


def pooler_head(_: Config) -> Head:
    """BERT's: the first token through the pooler that came with pre-training."""
    return Head((HeadModule("pooler.dense", "tanh"), HeadModule("classifier")))


def roberta_head(_: Config) -> Head:
    """RoBERTa's: the first token through a pooler of the classifier's own."""
    return Head((HeadModule("classifier.dense", "tanh"), HeadModule("classifier.out_proj")))


def vocabulary_head(config: Config) -> Head:
    """BERT's masked language model: a transform, then a product with the table of tokens."""
    prefix, act = "cls.predictions", activation(config, "hidden_act", "gelu")
    norms = (f"{prefix}.transform.LayerNorm", f"{prefix}.transform.layer_norm")
    return to_vocabulary(config, f"{prefix}.transform.dense", act, norms, f"{prefix}.decoder", f"{prefix}.bias")


def roberta_vocabulary_head(config: Config) -> Head:
    """RoBERTa's: the same under other names, its activation fixed."""
    norms = ("lm_head.layer_norm", "lm_head.norm")
    return to_vocabulary(config, "lm_head.dense", "gelu", norms, "lm_head.decoder", "lm_head.bias")


def to_vocabulary(
    config: Config, dense: str, act: str, norms: tuple[str, ...], decoder: str, bias: str = "", eps: float = 1e-12
) -> Head:
    """A layer, its activation, a norm, and a decoder that is the table of tokens unless the config unties them."""
    modules = (
        HeadModule(dense, act),
        HeadModule(norms[0], kind="norm", eps=config.get("layer_norm_eps", eps), also=norms[1:]),
        HeadModule(decoder, bias=bias, tied=config.get("tie_word_embeddings", True)),
    )
    return Head(modules, pooling=None)


_LAYOUT = Layout(EMBEDDINGS | LAYERS)

BERT = Family(
    ("bert",),
    bert,
    (_LAYOUT,),
    aside=HEADS,
    max_tokens=lambda config: config.get("max_position_embeddings", 512),
    sequence_head=pooler_head,
    token_head=token_classifier_head,
    vocabulary_head=vocabulary_head,
)
ROBERTA = Family(
    ("roberta", "xlm-roberta", "camembert"),
    roberta,
    (_LAYOUT,),
    aside=HEADS,
    max_tokens=from_pad_id,
    sequence_head=roberta_head,
    token_head=token_classifier_head,
    vocabulary_head=roberta_vocabulary_head,
)
