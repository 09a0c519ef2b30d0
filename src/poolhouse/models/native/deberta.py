"""DeBERTa v2 and v3: a post-norm encoder with disentangled attention, packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.layers.attention import disentangled
from poolhouse.layers.feed_forward import ACTIVATIONS, FeedForward
from poolhouse.layers.linear import Linear
from poolhouse.layers.norm import LayerNorm
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.transformer import linear_of, product_of
from poolhouse.models.native.weights import Weights
from poolhouse.packing.pack import Batch, Segments

Term = Literal["c2p", "p2c"]
# Two [2 * longest - 1]: where a query, and where a key, finds a token that is -(longest - 1) ... longest - 1 tokens ahead.
Buckets = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class DebertaSpec:
    """Behaviour that DeBERTa has beside a Transformer's.

    terms: which products with relative positions the scores have. span: distances, or buckets of them, on each side.
    max_distance: in tokens, where the buckets' logarithm ends; None where every distance is its own bucket.
    shared: relative positions go through the query and key projections of the content.
    normalised: the table of relative positions passes a norm. absolute: positions are also added to the embeddings.
    convolution: the activation behind it, or None where there is no convolution.
    """

    terms: frozenset[Term]
    span: int
    max_distance: int | None
    shared: bool
    normalised: bool
    absolute: bool
    convolution: str | None


class Deberta:
    """Token ids in, hidden states out, no padding in between."""

    reentrant = True
    longest_shared = 0
    picks = False

    def __init__(self, spec: TransformerSpec, deberta: DebertaSpec, weights: Weights) -> None:
        self.deberta = deberta
        self.tokens = (weights / "tokens").weight
        self.types = (weights / "types").get("weight")
        self.positions = (weights / "positions").weight if deberta.absolute else None
        self.project = linear_of(weights / "project") if weights / "project" else None
        self.embedding_norm = _norm(weights / "embedding_norm", spec)
        relative = _relative(spec, deberta, weights)
        layers = range(len(spec.layers))
        self.layers = [_Layer(spec, deberta, weights / f"layers.{layer}", relative) for layer in layers]
        self.convolution = None if deberta.convolution is None else Convolution(spec, deberta.convolution, weights)

    def __call__(self, batch: Batch) -> Tensor:
        """[total, hidden], in the type of the weights."""
        embedded = self._embed(batch)
        buckets = self._buckets(batch.segments)
        total = len(embedded)
        # Rows that are not read, so that products have one of few sizes.
        filler = (0, 0, 0, self.layers[0].attention.qkv.padded_rows(total) - total)
        x = self.layers[0](F.pad(embedded, filler), batch.segments, buckets)
        if self.convolution is not None:
            x = F.pad(self.convolution(embedded, x[:total], batch), filler)
        for layer in self.layers[1:]:
            x = layer(x, batch.segments, buckets)
        return x[:total]

    def _embed(self, batch: Batch) -> Tensor:
        x = F.embedding(batch.ids, self.tokens)
        if self.positions is not None:
            x = x + F.embedding(batch.positions, self.positions)
        if self.types is not None:
            x = x + (self.types[0] if batch.types is None else F.embedding(batch.types, self.types))
        return self.embedding_norm(x if self.project is None else self.project(x))

    def _buckets(self, segments: Segments) -> Buckets:
        """Rows of the relative table, which counts query position minus key position."""
        distance = torch.arange(1 - segments.longest, segments.longest, device=segments.device)
        span = self.deberta.span
        if self.deberta.max_distance is not None:
            distance = disentangled.log_bucket(distance, span, self.deberta.max_distance)
        of_key = (distance + span).clamp(0, 2 * span - 1)
        return of_key.flip(0), of_key


class Convolution:
    """norm(after + activation(convolution(before))), once, around the first layer; it sees no neighbouring sequence."""

    def __init__(self, spec: TransformerSpec, activation: str, weights: Weights) -> None:
        kernel = (weights / "convolution").weight
        # [out, in, taps] -> one product over all taps.
        self.taps = kernel.shape[2]
        self.linear = Linear(kernel.transpose(1, 2).flatten(1), (weights / "convolution").bias)
        self.linear.prepack()
        self.norm = _norm(weights / "convolution_norm", spec)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, before: Tensor, after: Tensor, batch: Batch) -> Tensor:
        """before: what the first layer took. after: what it gave."""
        total = len(before)
        reach = torch.arange(self.taps, device=before.device) - self.taps // 2
        neighbours = batch.positions[:, None] + reach
        lengths = batch.segments.lengths_tensor[batch.segments.owner]
        inside = (neighbours >= 0) & (neighbours < lengths[:, None])
        rows = torch.arange(total, device=before.device)[:, None] + reach
        # The row behind the last one is zero, as torch's padding is.
        seen = F.pad(before, (0, 0, 0, 1))[torch.where(inside, rows, total)]
        return self.norm(after + self.activation(self.linear(seen.flatten(1))))


class _Layer:
    """Attention and feed-forward, each added to what came in and normalised."""

    def __init__(self, spec: TransformerSpec, deberta: DebertaSpec, weights: Weights, relative: Tensor | None) -> None:
        self.attention = _Attention(spec, deberta, weights / "attn", relative)
        self.attn_post = _norm(weights / "attn_post", spec)
        ffn = weights / "ffn"
        self.feed_forward = FeedForward(product_of(ffn / "up"), product_of(ffn / "down"), spec.activation, gated=False)
        self.ffn_post = _norm(weights / "ffn_post", spec)

    def __call__(self, x: Tensor, segments: Segments, buckets: Buckets) -> Tensor:
        x = self.attn_post(self.attention.out.add_to(x, self.attention.mix(x, segments, buckets)))
        return self.ffn_post(self.feed_forward.add_to(x, x))


class _Attention:
    """Disentangled attention; relative positions are projected once, when the model is loaded."""

    def __init__(self, spec: TransformerSpec, deberta: DebertaSpec, weights: Weights, relative: Tensor | None) -> None:
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.scale = (spec.head_dim * (1 + len(deberta.terms))) ** -0.5
        self.position_key: Tensor | None = None
        self.position_query: Tensor | None = None
        if relative is not None:
            if "c2p" in deberta.terms:
                self.position_key = self._projected(relative, _projection(weights, deberta, "key"))
            if "p2c" in deberta.terms:
                self.position_query = self._projected(relative, _projection(weights, deberta, "query"))
        self.qkv, self.out = product_of(weights / "qkv"), product_of(weights / "out")

    def mix(self, x: Tensor, segments: Segments, buckets: Buckets) -> Tensor:
        """What `out` is applied to: [total, heads * head_dim]."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, self.head_dim).unbind(1)
        mixed = disentangled.attend(
            q,
            k,
            v,
            segments,
            scale=self.scale,
            position_key=_rows(self.position_key, buckets[0]),
            position_query=_rows(self.position_query, buckets[1]),
        )
        return mixed.flatten(1)

    def _projected(self, relative: Tensor, projection: tuple[Tensor, Tensor | None]) -> Tensor:
        """[2 * span, heads, head_dim]."""
        projected: Tensor = F.linear(relative, *projection) * self.scale
        return projected.view(-1, self.heads, self.head_dim)


def _projection(weights: Weights, deberta: DebertaSpec, part: Literal["query", "key"]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that relative positions go through."""
    own = weights / f"position_{part}"
    if not deberta.shared:
        return own.weight, own.bias
    which = {"query": 0, "key": 1}[part]
    qkv = weights / "qkv"
    return qkv.weight.chunk(3)[which], None if qkv.bias is None else qkv.bias.chunk(3)[which]


def _relative(spec: TransformerSpec, deberta: DebertaSpec, weights: Weights) -> Tensor | None:
    """[2 * span, hidden]: the table of relative positions, normalised where the checkpoint has a norm for it."""
    if not deberta.terms:
        return None
    table = (weights / "relative").weight[: 2 * deberta.span]
    return _norm(weights / "relative_norm", spec)(table) if deberta.normalised else table


def _rows(table: Tensor | None, index: Tensor) -> Tensor | None:
    return None if table is None else table.index_select(0, index)


def _norm(weights: Weights, spec: TransformerSpec) -> LayerNorm:
    return LayerNorm(weights.weight, weights.bias, spec.norm_eps)
