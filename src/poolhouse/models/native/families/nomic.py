"""NomicBERT: BERT with rotary positions and a gated feed-forward or experts, in the hub's layout and in transformers'.

Source of the hub's names: transformers' own conversion table for nomic_bert; of the experts: the hub's own model code.
"""

from __future__ import annotations

from poolhouse.layers.positions import RopeSpec
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head
from poolhouse.models.native.families._config import activation, refuse, rope
from poolhouse.models.native.families.bert import HEADS, pooler_head, vocabulary_head
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.weights import Bare, Layout, Source


def _nomic(config: Config) -> TransformerSpec:
    return _hub(config) if "n_embd" in config else _native(config)


def _native(config: Config) -> TransformerSpec:
    heads = config.get("num_attention_heads", 12)
    head_dim = config.get("head_dim") or config.get("hidden_size", 768) // heads
    return TransformerSpec(
        heads=heads,
        head_dim=head_dim,
        layers=(LayerSpec(rope=rope(config, head_dim, 1000.0)),) * config.get("num_hidden_layers", 12),
        activation=activation(config, "hidden_act", "silu"),
        gated=True,
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )


# The hub's name of the feed-forward -> its activation, and whether it is gated.
_FEED_FORWARDS = {"swiglu": ("silu", True), "geglu": ("gelu", True), "gelu": ("gelu", False), "relu": ("relu", False)}


def _hub(config: Config) -> TransformerSpec:
    """The config of the hub's repositories, under GPT-2's keys."""
    refuse(
        config,
        {
            "activation_function": tuple(_FEED_FORWARDS),
            "prenorm": (False,),
            "rotary_emb_interleaved": (False,),
            "rotary_emb_scale_base": (None,),
            "use_rms_norm": (False, None),
            "causal": (False,),
            "parallel_block": (False,),
            "expert_choice_router": (False, None),
            "moe_normalize_expert_weights": (False, None),
            "num_shared_experts": (None, 0),
        },
    )
    name, gated = _FEED_FORWARDS[config.get("activation_function", "swiglu")]
    heads = config["n_head"]
    head_dim = config["n_embd"] // heads
    dim, theta = int(head_dim * config.get("rotary_emb_fraction", 1.0)), float(config.get("rotary_emb_base", 1000))
    factor = config.get("rotary_scaling_factor")
    turns = RopeSpec(dim, theta)
    if factor:
        turns = RopeSpec(dim, theta, "dynamic", factor, original_length=config.get("max_trained_positions", 2048))
    return TransformerSpec(
        heads=heads,
        head_dim=head_dim,
        layers=tuple(LayerSpec(rope=turns, experts=_experts(config, layer)) for layer in range(config["n_layer"])),
        activation=name,
        gated=gated,
        norm_eps=config.get("layer_norm_epsilon", 1e-12),
    )


def _vocabulary_head(config: Config) -> Head:
    return vocabulary_head({"hidden_act": "silu", "layer_norm_eps": config.get("layer_norm_epsilon", 1e-12), **config})


def _experts(config: Config, layer: int) -> int:
    """How many experts a token passes in this layer: every n-th layer has some, the first never."""
    every = config.get("moe_every_n_layers") or 0
    return int(config.get("moe_top_k", 1)) if every > 0 and layer % every == 1 else 0


def _max_tokens(config: Config) -> int | None:
    if "n_embd" not in config:
        return int(config.get("max_position_embeddings", 2048))
    positions = int(config.get("n_positions", 8192))
    if config.get("rotary_scaling_factor"):
        return positions
    # Without a scaling, the model knows only the positions that it was trained on.
    return min(positions, int(config.get("max_trained_positions") or positions))


NATIVE_NAMES: dict[str, Source] = {
    "tokens": "embeddings.word_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layers.*.attn.qkv": tuple(f"layers.*.self_attn.{name}_proj" for name in "qkv"),
    "layers.*.attn.out": "layers.*.self_attn.o_proj",
    "layers.*.attn_post": "layers.*.post_attention_layernorm",
    "layers.*.ffn.up": ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"),
    "layers.*.ffn.down": "layers.*.mlp.down_proj",
    "layers.*.ffn_post": "layers.*.post_mlp_layernorm",
}
_HUB_NAMES: dict[str, Source] = {
    "tokens": "embeddings.word_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embedding_norm": "emb_ln",
    "layers.*.attn.qkv": "encoder.layers.*.attn.Wqkv",
    "layers.*.attn.out": "encoder.layers.*.attn.out_proj",
    "layers.*.attn_post": "encoder.layers.*.norm1",
    "layers.*.ffn.up": ("encoder.layers.*.mlp.fc12", "encoder.layers.*.mlp.fc11"),
    "layers.*.ffn.down": "encoder.layers.*.mlp.fc2",
    "layers.*.ffn_post": "encoder.layers.*.norm2",
}

_PLAIN_NAMES = _HUB_NAMES | {"layers.*.ffn.up": "encoder.layers.*.mlp.fc1"}
_EXPERT_NAMES: dict[str, Source] = {
    "layers.*.ffn.router": "encoder.layers.*.mlp.router.layer",
    "layers.*.ffn.expert_up": Bare("encoder.layers.*.mlp.experts.mlp.w1"),
    "layers.*.ffn.expert_down": Bare("encoder.layers.*.mlp.experts.mlp.w2"),
    "layers.*.ffn.experts": "encoder.layers.*.mlp.experts",
}
_EITHER = frozenset({"layers.*.ffn.up", "layers.*.ffn.down", *_EXPERT_NAMES})
_TYPES = frozenset({"types"})

NOMIC = Family(
    ("nomic_bert",),
    _nomic,
    (
        Layout(_HUB_NAMES, optional=_TYPES),
        Layout(_PLAIN_NAMES, optional=_TYPES),
        Layout(_PLAIN_NAMES | _EXPERT_NAMES, optional=_TYPES, varying=_EITHER),
        Layout(NATIVE_NAMES, optional=_TYPES),
    ),
    aside=HEADS,
    max_tokens=_max_tokens,
    sequence_head=pooler_head,
    token_head=token_classifier_head,
    vocabulary_head=_vocabulary_head,
)
