"""Spec: what a checkpoint's tensors cannot say, the meaning of their numbers."""

from __future__ import annotations

from dataclasses import dataclass

from poolhouse.layers.norm import NormKind
from poolhouse.layers.positions import RopeSpec


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer.

    window: tokens seen on each side, inclusive; None sees all.
    experts: how many experts a token passes in place of one feed-forward; 0 where there are none.
    """

    window: int | None = None
    rope: RopeSpec | None = None
    experts: int = 0


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """Behaviour of a Transformer; its structure (norms, biases, tables, sizes) is read from the tensors.

    position_offset: the row of the position table that the first token takes (RoBERTa: pad id + 1).
    uncounted: the id of tokens that are not counted in positions (RoBERTa: padding, which a text may write).
    attention_scale: factor on scores, 1 / sqrt(head_dim) where None.
    softcap: Gemma 2 squeezes attention scores to this range by tanh.
    """

    heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    activation: str = "gelu"
    gated: bool = False
    causal: bool = False
    norm: NormKind = "layer"
    norm_eps: float = 1e-12
    position_offset: int = 0
    uncounted: int | None = None
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    softcap: float | None = None
    alibi: bool = False
