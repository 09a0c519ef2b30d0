"""Qwen2, with biases on query, key and value, Qwen3, with norms on both, Voyage's and Perplexity's Qwen3, Qwen-VL's text halves."""

from __future__ import annotations

from dataclasses import replace

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import NotNative
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.families.llama import HEADS, NAMES, QK_NORMS, decoder, windows
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.weights import Layout

_DEFAULTS = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN2_VL_DEFAULTS = {
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
}


def _qwen2(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    return decoder(config, _windows(config))


def _qwen3(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    return decoder(config, _windows(config), head_dim=128)


def _both_sides(config: Config) -> TransformerSpec:
    return _qwen3({**config, "is_causal": False})


def _qwen2_vl(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **_QWEN2_VL_DEFAULTS, **config}
    return _with_axes(decoder(config, _windows(config), theta=1e6), (16, 24, 24), interleaved=False)


def _qwen3_vl(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    spec = decoder(config, [None] * config["num_hidden_layers"], head_dim=128, theta=5e5)
    return _with_axes(spec, (24, 20, 20), interleaved=True)


def _with_axes(spec: TransformerSpec, sections: tuple[int, ...], interleaved: bool) -> TransformerSpec:
    """The spec with positions of three axes. sections: where the config has none."""
    layers: list[LayerSpec] = []
    for layer in spec.layers:
        assert layer.rope is not None
        turns = replace(layer.rope, sections=layer.rope.sections or sections, interleaved=interleaved)
        if len(turns.sections) != 3 or sum(turns.sections) != turns.dim // 2:
            raise NotNative(
                f"config.json: mrope_section {list(turns.sections)} must share out {turns.dim // 2} frequencies."
            )
        layers.append(replace(layer, rope=turns))
    return replace(spec, layers=tuple(layers))


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
    _both_sides,
    (Layout(NAMES | QK_NORMS | {"output": "linear"}, outside=frozenset({"output"})),),
    pooling="MEAN",
    aside=HEADS,
    max_tokens=_max_tokens,
)
# Its quantiser is a module of sentence-transformers' files.
PPLX = replace(QWEN3, model_types=("bidirectional_pplx_qwen3",), spec=_both_sides, pooling="MEAN", aside=HEADS)
# The text halves of Qwen2-VL and Qwen2.5-VL, and of Qwen3-VL: rows of `poolhouse.models.vision.kinds` name them.
# Pictures drive their states, and those of the towers, beyond float16's range.
QWEN2_VL_TEXT = replace(QWEN2, model_types=("qwen2_vl_text", "qwen2_5_vl_text"), spec=_qwen2_vl, float16=False)
QWEN3_VL_TEXT = replace(
    QWEN3,
    model_types=("qwen3_vl_text",),
    spec=_qwen3_vl,
    aside=HEADS,
    float16=False,
    max_tokens=lambda config: int(config.get("max_position_embeddings", 128000)),
)
