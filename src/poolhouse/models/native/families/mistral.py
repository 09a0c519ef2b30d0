"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import NotNative
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.families.llama import HEADS, NAMES, decoder
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout

DEFAULTS = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def _mistral(config: Config) -> TransformerSpec:
    config = {**DEFAULTS, **config}
    window = config["sliding_window"]
    # transformers' Mistral has one kind of layer whatever `layer_types` says, so a mixture is somebody else's model.
    if window and set(config.get("layer_types") or ()) - {"sliding_attention"}:
        raise NotNative("config.json: layer_types mixes kinds of attention, which Mistral does not.")
    return decoder(config, [window] * config["num_hidden_layers"])


MISTRAL = Family(
    ("mistral",),
    _mistral,
    (Layout(NAMES),),
    pooling="LAST",
    aside=HEADS,
    max_tokens=lambda config: config.get("max_position_embeddings", 131072),
)
