"""ModernBERT: pre-norm, gated, rotary; most layers see a window only."""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.families._config import NotNative, activation, rope
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.weights import Layout, Source


def _modernbert(config: Config) -> TransformerSpec:
    heads = config.get("num_attention_heads", 12)
    head_dim = config.get("hidden_size", 768) // heads
    # The config states the width of the window; half of it lies on each side of a token.
    window = config.get("local_attention", 128) // 2
    kinds = {
        "full_attention": LayerSpec(None, rope(_with_theta(config, "global"), head_dim, 160000.0, "full_attention")),
        "sliding_attention": LayerSpec(
            window, rope(_with_theta(config, "local"), head_dim, 10000.0, "sliding_attention")
        ),
    }
    types = config.get("layer_types") or _layer_types(config)
    if not set(types) <= set(kinds):
        raise NotNative(f"config.json: layer_types holds {sorted(set(types) - set(kinds))}.")
    return TransformerSpec(
        heads=heads,
        head_dim=head_dim,
        layers=tuple(kinds[kind] for kind in types),
        activation=activation(config, "hidden_activation", "gelu"),
        gated=True,
        norm_eps=config.get("norm_eps", 1e-5),
    )


def _layer_types(config: Config) -> list[str]:
    every = config.get("global_attn_every_n_layers", 3)
    layers = config.get("num_hidden_layers", 22)
    return ["sliding_attention" if layer % every else "full_attention" for layer in range(layers)]


def _with_theta(config: Config, kind: str) -> Config:
    """The config with the base of one kind of layer where `rope` looks for it; files before transformers 5 have two."""
    theta = config.get(f"{kind}_rope_theta")
    return config if theta is None or config.get("rope_parameters") else {**config, "rope_theta": theta}


_NAMES: dict[str, Source] = {
    "tokens": "embeddings.tok_embeddings",
    "embedding_norm": "embeddings.norm",
    "layers.*.attn_in": "layers.*.attn_norm",
    "layers.*.attn.qkv": "layers.*.attn.Wqkv",
    "layers.*.attn.out": "layers.*.attn.Wo",
    "layers.*.ffn_in": "layers.*.mlp_norm",
    "layers.*.ffn.up": "layers.*.mlp.Wi",
    "layers.*.ffn.down": "layers.*.mlp.Wo",
    "final_norm": "final_norm",
}


def _head_modules(config: Config, last: HeadModule) -> tuple[HeadModule, ...]:
    name = activation(config, "classifier_activation", "gelu")
    norm = HeadModule("head.norm", kind="norm", eps=config.get("norm_eps", 1e-5))
    return (HeadModule("head.dense", name), norm, last)


def _sequence_head(config: Config) -> Head:
    name = str(config.get("classifier_pooling", "cls"))
    if name not in ("cls", "mean"):
        raise NotNative(f"config.json: classifier_pooling is {name!r}, which is neither cls nor mean.")
    return Head(_head_modules(config, HeadModule("classifier")), name.upper(), fixed=True)


def _token_head(config: Config) -> Head:
    return Head(_head_modules(config, HeadModule("classifier")), pooling=None)


def _vocabulary_head(config: Config) -> Head:
    decoder = HeadModule("decoder", tied=config.get("tie_word_embeddings", True))
    return Head(_head_modules(config, decoder), pooling=None)


MODERNBERT = Family(
    ("modernbert",),
    _modernbert,
    # The first layer takes the embeddings, which are normalised already.
    (Layout(_NAMES, varying=frozenset({"layers.*.attn_in"})),),
    aside=(r"head\.(dense|norm)\.(weight|bias)", r"(decoder|classifier)\.(weight|bias)"),
    max_tokens=lambda config: config.get("max_position_embeddings", 8192),
    sequence_head=_sequence_head,
    token_head=_token_head,
    vocabulary_head=_vocabulary_head,
)
