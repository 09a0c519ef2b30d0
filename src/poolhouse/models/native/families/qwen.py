"""Qwen2, with biases on query, key and value, Qwen3, with norms on query and key, and Voyage's embedder of Qwen3."""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.families.llama import HEADS, NAMES, QK_NORMS, decoder, windows
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout

_DEFAULTS = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _qwen2(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    return decoder(config, _windows(config))


def _qwen3(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    return decoder(config, _windows(config), head_dim=128)


def _voyage(config: Config) -> TransformerSpec:
    return _qwen3({**config, "is_causal": False})


def _windows(config: Config) -> list[int | None]:
    """Without `layer_types` the first `max_window_layers` layers see everything."""
    window = config["sliding_window"] if config.get("use_sliding_window") else None
    return windows(
        {**config, "sliding_window": window},
        lambda layer: window is not None and layer >= config["max_window_layers"],
    )


def _max_tokens(config: Config) -> int:
    return int(config.get("max_position_embeddings", 32768))


QWEN2 = Family(("qwen2",), _qwen2, (Layout(NAMES),), pooling="LAST", aside=HEADS, max_tokens=_max_tokens)
QWEN3 = Family(
    ("qwen3",),
    _qwen3,
    (Layout(NAMES | QK_NORMS),),
    pooling="LAST",
    # jina-reranker-v3 has a projector.
    aside=(*HEADS, r"projector\.[02]\.weight"),
    max_tokens=_max_tokens,
)
# Tokens see both sides, and each hidden state is projected to `num_labels` features, before any pooling.
QWEN3_VOYAGE = Family(
    ("qwen3-voyage",),
    _voyage,
    (Layout(NAMES | QK_NORMS | {"output": "linear"}, outside=frozenset({"output"})),),
    pooling="MEAN",
    aside=HEADS,
    max_tokens=_max_tokens,
)
