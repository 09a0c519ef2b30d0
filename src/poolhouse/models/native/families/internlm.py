"""InternLM2: Llama under other names, with query, key and value of each group in one tensor."""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import refuse
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.families.llama import decoder
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import ByGroup, Layout, Source

_DEFAULTS = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 2048,
}


def _internlm2(config: Config) -> TransformerSpec:
    config = {**_DEFAULTS, **config}
    refuse(config, {"sliding_window": (None,), "rotary": (None,)})
    return decoder(config, [None] * config["num_hidden_layers"])


_NAMES: dict[str, Source] = {
    "tokens": "tok_embeddings",
    "layers.*.attn_in": "layers.*.attention_norm",
    "layers.*.attn.qkv": ByGroup("layers.*.attention.wqkv"),
    "layers.*.attn.out": "layers.*.attention.wo",
    "layers.*.ffn_in": "layers.*.ffn_norm",
    "layers.*.ffn.up": ("layers.*.feed_forward.w1", "layers.*.feed_forward.w3"),
    "layers.*.ffn.down": "layers.*.feed_forward.w2",
    "final_norm": "norm",
}

INTERNLM2 = Family(
    ("internlm2",),
    _internlm2,
    (Layout(_NAMES),),
    pooling="LAST",
    aside=(
        r"(output|v_head|score|qa_outputs|classifier)\.(weight|bias)",
        r"layers\.\d+\.attention\.rotary_emb\.inv_freq",
    ),
    max_tokens=lambda config: config.get("max_position_embeddings", 2048),
)
