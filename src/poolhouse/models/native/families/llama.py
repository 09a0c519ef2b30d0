"""Llama, and what its descendants share with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.own_classes import own_class_of
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.families._config import NotNative, activation, pooling, refuse, rope
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.weights import Layout, Source

NAMES: dict[str, Source] = {
    "tokens": "embed_tokens",
    "layers.*.attn_in": "layers.*.input_layernorm",
    "layers.*.attn.qkv": tuple(f"layers.*.self_attn.{name}_proj" for name in "qkv"),
    "layers.*.attn.out": "layers.*.self_attn.o_proj",
    "layers.*.ffn_in": "layers.*.post_attention_layernorm",
    "layers.*.ffn.up": ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"),
    "layers.*.ffn.down": "layers.*.mlp.down_proj",
    "final_norm": "norm",
}
QK_NORMS: dict[str, Source] = {
    "layers.*.attn.q_norm": "layers.*.self_attn.q_norm",
    "layers.*.attn.k_norm": "layers.*.self_attn.k_norm",
}

HEADS = (
    r"(lm_head|score|classifier|v_head|qa_outputs)\.([\w]+\.)*(weight|bias)",
    # Old files store the frequencies, which follow from the config.
    r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)


def is_causal(config: Config) -> bool:
    """False where a config lets tokens see both sides, by any of the keys for it."""
    bidirectional = (
        config.get("is_causal") is False
        or config.get("use_bidirectional_attention") is True
        or own_class_of(config) is not None
    )
    return not bidirectional


def each_side(window: int, causal: bool) -> int:
    """Tokens seen on each side; a causal window counts the token itself, a window to both sides does not."""
    return window - 1 if causal else window


def windows(config: Config, sliding: Callable[[int], bool]) -> list[int | None]:
    """The window of each layer, None where it sees everything. sliding: which layers have one by default."""
    layers, window = config["num_hidden_layers"], config["sliding_window"]
    types = config.get("layer_types")
    if types is None:
        types = ["sliding_attention" if sliding(layer) else "full_attention" for layer in range(layers)]
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise NotNative(
            f"config.json: layer_types must say sliding_attention or full_attention {layers} times: {types}."
        )
    if "sliding_attention" in types and not window:
        raise NotNative("config.json: layer_types has sliding_attention, but no sliding_window is in use.")
    return [window if kind == "sliding_attention" else None for kind in types]


def decoder(
    config: Config, windows: list[int | None], head_dim: int | None = None, theta: float = 10000.0
) -> TransformerSpec:
    """What Llama's descendants share. windows: the config's sliding window of each layer, or None. theta: the default."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or head_dim or config["hidden_size"] // heads
    turns = rope(config, head_dim, theta)
    if turns.dim != head_dim:
        raise NotNative("config.json: partial_rotary_factor is set; the native family turns whole heads.")
    causal = is_causal(config)
    return TransformerSpec(
        heads=heads,
        head_dim=head_dim,
        layers=tuple(LayerSpec(each_side(window, causal) if window else None, turns) for window in windows),
        activation=activation(config, "hidden_act", "silu"),
        gated=True,
        causal=causal,
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
    )


_DEFAULTS = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 2048,
}


def _llama(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    refuse(config, {"sliding_window": (None,)})
    return decoder(config, [None] * config["num_hidden_layers"])


def _bidirectional(config: Config) -> TransformerSpec:
    return _llama({**config, "is_causal": False})


def _bidirectional_head(config: Config) -> Head:
    """The mean of all tokens through one matrix (llama-nemotron-rerank)."""
    refuse(config, {"temperature": (None, 1, 1.0)})
    return Head((HeadModule("score"),), pooling="MEAN", fixed=True)


def _stated_pooling(config: Config) -> str | None:
    """Nvidia's bidirectional embedders say how to pool in config.json; a plain Llama's files have no such key."""
    return None if is_causal(config) and config["model_type"] == "llama" else pooling(config, "pooling")


def _max_tokens(config: Config) -> int:
    return int(config.get("max_position_embeddings", 2048))


LLAMA = Family(
    # Aquila is Llama under another name.
    ("llama", "aquila"),
    _llama,
    (Layout(NAMES),),
    pooling="LAST",
    stated_pooling=_stated_pooling,
    aside=HEADS,
    max_tokens=_max_tokens,
)
LLAMA_BIDIRECTIONAL = replace(
    LLAMA,
    model_types=("llama_bidirec",),
    spec=_bidirectional,
    pooling="MEAN",
    sequence_head=_bidirectional_head,
)
