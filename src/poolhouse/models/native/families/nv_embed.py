"""NV-Embed: Mistral whose tokens see both sides, and latent attention behind it.

Source: Lee et al. 2024, NV-Embed (arXiv 2405.17428), and the model code of nvidia/NV-Embed-v2. A token asks a dictionary of
learned vectors, each by itself, so that a pack needs no bounds here:

    h = h + out(attention(norm(h), keys and values of the dictionary))        h = h + down(up(norm(h)), gated by gelu)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.layers.norm import LayerNorm
from poolhouse.models.backbone import Backbone
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import refuse
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.families.llama import HEADS, NAMES, decoder
from poolhouse.models.native.families.mistral import DEFAULTS
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.transformer import Transformer, linear_of
from poolhouse.models.native.weights import Bare, Layout, Source, Weights

_EPS = 1e-5


def _text(config: Config) -> Config:
    return {**DEFAULTS, **(config.get("text_config") or {})}


def _nv_embed(config: Config) -> TransformerSpec:
    """Its code makes a mask without a window, whatever `sliding_window` says."""
    refuse(config, {"mask_type": ("b",), "is_mask_instruction": (True,)})
    text = _text(config)
    return decoder({**text, "is_causal": False}, [None] * text["num_hidden_layers"])


class LatentAttention:
    """The hidden state of each token, mixed with what it finds in a dictionary of learned vectors.

    heads: of the attention. weights: the slots `latent.*`; keys and values of the dictionary are computed once.
    """

    def __init__(self, heads: int, weights: Weights) -> None:
        self.heads = heads
        self.norm = _norm(weights / "norm")
        self.query, self.out = linear_of(weights / "query"), linear_of(weights / "out")
        self.ffn_norm = _norm(weights / "ffn_norm")
        self.up, self.down = linear_of(weights / "ffn_up"), linear_of(weights / "ffn_down")
        dictionary = _norm(weights / "table_norm")((weights / "table").weight)
        pairs = F.linear(dictionary, (weights / "key_value").weight)
        if pairs.shape[1] % (2 * heads):
            raise CheckpointError(
                f"latent_attention_config: num_cross_heads is {heads}, which do not share {pairs.shape[1] // 2} features."
            )
        # [1, heads, latents, features of a head]
        self.keys, self.values = (half.unflatten(1, (heads, -1)).transpose(0, 1)[None] for half in pairs.chunk(2, -1))

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] to [rows, hidden]."""
        queries = self.query(self.norm(x)).unflatten(1, (self.heads, -1)).transpose(0, 1)[None]
        found = F.scaled_dot_product_attention(queries, self.keys, self.values)
        x = x + self.out(found[0].transpose(0, 1).flatten(1))
        value, gate = self.up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(value * F.gelu(gate))


def _norm(weights: Weights) -> LayerNorm:
    return LayerNorm(weights.weight, weights.bias, _EPS)


def _backbone(config: Config, spec: TransformerSpec, weights: Weights) -> Backbone:
    transformer = Transformer(spec, weights)
    heads = (config.get("latent_attention_config") or {}).get("num_cross_heads", 8)
    transformer.output = LatentAttention(heads, weights / "latent")
    return transformer


_BLOCK = "latent_attention_model.cross_attend_blocks."
_LATENT: dict[str, Source] = {
    "latent.table": Bare("latent_attention_model.latents"),
    "latent.norm": _BLOCK + "0.norm",
    "latent.table_norm": _BLOCK + "0.norm_context",
    "latent.query": _BLOCK + "0.fn.to_q",
    "latent.key_value": _BLOCK + "0.fn.to_kv",
    "latent.out": _BLOCK + "0.fn.to_out",
    "latent.ffn_norm": _BLOCK + "1.norm",
    "latent.ffn_up": _BLOCK + "1.fn.net.0",
    "latent.ffn_down": _BLOCK + "1.fn.net.2",
}

NV_EMBED = Family(
    ("nvembed",),
    _nv_embed,
    (Layout(NAMES | _LATENT, outside=frozenset(_LATENT)),),
    pooling="MEAN",
    aside=HEADS,
    max_tokens=lambda config: _text(config).get("max_position_embeddings"),
    backbone=_backbone,
)
