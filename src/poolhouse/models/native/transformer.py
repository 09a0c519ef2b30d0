"""Transformer: the packed one that nearly every native family runs on.

A block has six norm slots that a checkpoint fills or leaves, so pre-norm, post-norm and sandwich-norm are one code:

    x = attn_post(x + attn_out(attention(attn_in(x))))
    x = ffn_post(x + ffn_out(feed_forward(ffn_in(x))))
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse import kernels
from poolhouse.errors import CheckpointError, EngineError
from poolhouse.layers.adapted import AdaptedTable
from poolhouse.layers.attention import attend
from poolhouse.layers.feed_forward import Experts, FeedForward
from poolhouse.layers.int8 import Int8Linear
from poolhouse.layers.linear import Linear, Product
from poolhouse.layers.norm import LayerNorm, Norm, RMSNorm
from poolhouse.layers.positions import RopeSpec, alibi_bias, relative_bias, rope_table, rotate
from poolhouse.models.backbone import PictureRows, Tower
from poolhouse.models.native.few_rows import FewRows
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.weights import Weights
from poolhouse.packing.pack import Batch, PackedPictures, Read, Segments

Ropes = dict[RopeSpec, tuple[Tensor, Tensor]]

_TABLE = (("rows", ctypes.c_void_p), ("count", ctypes.c_int64))
_EMBED = (*(kernels.ADDRESS, kernels.COUNT), *[kernels.ADDRESS] * 5, kernels.COUNT)


class _Tables(ctypes.Structure):
    """As in embed.cpp."""

    _fields_ = (
        *((f"{name}_{part}", kind) for name in ("tokens", "types", "positions") for part, kind in _TABLE),
        *(("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)),
        *((name, ctypes.c_int64) for name in ("width", "offset", "root_mean_square")),
        *(("scale", ctypes.c_float), ("eps", ctypes.c_float)),
    )


class Transformer:
    """Token ids in, hidden states out, no padding in between."""

    reentrant = True
    picks = True

    def __init__(self, spec: TransformerSpec, weights: Weights) -> None:
        self.spec = spec
        self.tokens = (weights / "tokens").weight
        self.positions = _table(weights / "positions")
        self.types = _table(weights / "types")
        self.relative = _table(weights / "relative")
        self.embedding_norm = norm_of(weights / "embedding_norm", spec)
        self.project: Product | None = linear_of(weights / "project") if weights / "project" else None
        self.layers = blocks(spec, weights)
        self.final_norm = norm_of(weights / "final_norm", spec)
        # What a hidden state passes in the end, of models that have such a thing.
        self.output: Callable[[Tensor], Tensor] | None = linear_of(weights / "output") if weights / "output" else None
        self.ropes = {layer.rope for layer in spec.layers if layer.rope}
        self.longest_shared = self._longest_shared()
        self._rows = self.layers[0].attention.qkv.padded_rows
        # The share of each hidden state in the answer, the embeddings' first; None for the last alone.
        self.shares: tuple[float, ...] | None = None
        # What makes rows of pictures, of models that read them.
        self.tower: Tower | None = None
        # Filled by `Adapters`, where a model has some.
        self.adapted_tables: dict[str, AdaptedTable] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """[total, hidden], in the type of the weights; hidden is the width of `output` where there is one.

        Where the batch says what is read, [prompts, hidden] of these rows.
        """
        x = self._embed(batch)
        shown = None if batch.pictures is None else self._shown(x, batch.pictures)
        longest = batch.segments.longest
        positions = batch.positions if batch.pictures is None or batch.pictures.axes is None else batch.pictures.axes
        ropes = {rope: rope_table(rope, positions, batch.segments, x.dtype) for rope in self.ropes}
        total = len(x)
        bias = self._bias(longest)
        few_rows = self.few_rows if self.shares is None and shown is None else None
        if few_rows is not None and few_rows.takes(batch.segments):
            x = few_rows(x, batch.segments, ropes, bias)
            return self._answer(x if batch.read is None else x[batch.read.rows])
        if missing := self._rows(total) - total:
            # Rows that are not read, so that products have one of few sizes.
            x = F.pad(x, (0, 0, 0, missing))
            filler = (0, 0, 0, 0, 0, missing)
            ropes = {rope: (F.pad(cos, filler), F.pad(sin, filler)) for rope, (cos, sin) in ropes.items()}
        mixed = None if self.shares is None else x * self.shares[0]
        # The last layer need not go on with rows that nobody reads.
        read = batch.read if mixed is None and shown is None else None
        if read is not None and (filler_rows := self._rows(len(read.rows)) - len(read.rows)):
            read = Read(F.pad(read.rows, (0, filler_rows)), read.segments)
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, batch.segments, ropes, bias, read if number == len(self.layers) else None)
            if batch.pictures is not None and shown is not None and number <= len(shown.deep):
                x = x.index_add(0, batch.pictures.filled, batch.pictures.taken(shown.deep[number - 1]))
            if mixed is not None and self.shares is not None and number < len(self.layers):
                mixed = mixed.add_(x, alpha=self.shares[number])
        if batch.read is not None and read is None:
            x = x[batch.read.rows]
            mixed = None if mixed is None else mixed[batch.read.rows]
        elif batch.read is not None:
            x = x[: len(batch.read.rows)]
        elif missing:
            x = x[:total]
            mixed = None if mixed is None else mixed[:total]
        return self._answer(x, mixed)

    def _answer(self, x: Tensor, mixed: Tensor | None = None) -> Tensor:
        """What the last block's answer becomes. mixed: the share of what lies below it, where the layers are mixed."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if mixed is not None and self.shares is not None:
            x = mixed.add_(x, alpha=self.shares[-1])
        return x if self.output is None else self.output(x)

    @cached_property
    def few_rows(self) -> FewRows | None:
        """What runs the blocks over short packs, where they are of the kind; adapters change layers before this is asked."""
        return FewRows.of(self.spec, self.layers)

    def mix_layers(self, first: int, weights: tuple[float, ...]) -> None:
        """Answer with a sum of hidden states: `weights` of those from `first` on, which counts from the end if negative.

        The hidden states are the embeddings, then the answer of each layer, the last behind the final norm.

        Raises:
            CheckpointError: the model has fewer, or its answer is no hidden state.
        """
        count = len(self.layers) + 1
        start = first + count if first < 0 else first
        if not 0 <= start <= count - len(weights) or self.output is not None:
            raise CheckpointError(
                f"The files take {len(weights)} hidden states from number {first} on, but the model has {count}."
            )
        self.shares = (*[0.0] * start, *weights, *[0.0] * (count - start - len(weights)))

    def _shown(self, x: Tensor, pictures: PackedPictures) -> PictureRows:
        """Rows of pictures, which take their places in x, a tensor of our own."""
        if self.tower is None:
            raise EngineError("This model reads no pictures.")
        shown = self.tower(pictures)
        x[pictures.filled] = pictures.taken(shown.rows).to(x.dtype)
        return shown

    def _embed(self, batch: Batch) -> Tensor:
        # A table of one row has one type for all (RoBERTa).
        types = batch.types if self.types is not None and len(self.types) > 1 else None
        positions, uncounted = batch.positions, self.spec.uncounted
        if self.positions is not None and uncounted is not None:
            positions = batch.positions_without(uncounted)
        x = self._embedded_at_once(batch.ids, types, positions)
        if x is None:
            x = self._embedded(batch, types, positions)
        return x if self.project is None else self.project(x, segments=batch.segments)

    def _embedded(self, batch: Batch, types: Tensor | None, positions: Tensor) -> Tensor:
        x = self._adapted("tokens", F.embedding(batch.ids, self.tokens), batch.ids, batch.segments)
        if self.spec.embedding_scale != 1.0:
            # The factor is rounded to the type of the weights first, as the reference does.
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype, device=x.device)
        if self.types is not None:
            x = x + (self.types[0] if types is None else F.embedding(types, self.types))
            x = self._adapted("types", x, types, batch.segments)
        if self.positions is not None:
            rows = positions + self.spec.position_offset
            x = self._adapted("positions", x + F.embedding(rows, self.positions), rows, batch.segments)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _embedded_at_once(self, ids: Tensor, types: Tensor | None, positions: Tensor) -> Tensor | None:
        """The same by a kernel, to the last bit; None where it cannot, or a number is in no table."""
        tables = None if self.adapted_tables else self._plain_tables
        if tables is None:
            return None
        kernel, given = tables
        x, found = self.tokens.new_empty(len(ids), self.tokens.shape[1]), ctypes.c_int64(0)
        kernel(
            *(ctypes.addressof(given), len(ids), ids.data_ptr(), None if types is None else types.data_ptr()),
            *(positions.data_ptr(), x.data_ptr(), ctypes.addressof(found), torch.get_num_threads()),
        )
        return x if found.value else None

    @cached_property
    def _plain_tables(self) -> tuple[Callable[..., None], _Tables] | None:
        """The kernel that reads the tables, and where they lie; None where it cannot read them, or there is none."""
        kernel = kernels.function("poolhouse_embed", *_EMBED)
        norm, width = self.embedding_norm, self.tokens.shape[1]
        read = [table for table in (self.tokens, self.types, self.positions) if table is not None]
        if isinstance(norm, LayerNorm | RMSNorm):
            read.append(norm.weight)
        elif norm is not None:
            return None
        plain = all(one.dtype == torch.float32 and one.device.type == "cpu" and one.is_contiguous() for one in read)
        if kernel is None or not plain or width % 16:
            return None

        def place(values: Tensor | None) -> int | None:
            return None if values is None else values.data_ptr()

        tables = ((place(one), 0 if one is None else len(one)) for one in (self.tokens, self.types, self.positions))
        return kernel, _Tables(
            *(part for table in tables for part in table),
            place(None if norm is None else norm.weight),
            place(norm.bias if isinstance(norm, LayerNorm) else None),
            *(width, self.spec.position_offset, isinstance(norm, RMSNorm)),
            *(self.spec.embedding_scale, 0.0 if norm is None else norm.eps),
        )

    def _adapted(self, table: str, x: Tensor, ids: Tensor | None, segments: Segments) -> Tensor:
        """x, a tensor of our own, with what adapters change in the rows `ids` of a table."""
        if table in self.adapted_tables:
            self.adapted_tables[table].add_to(x, ids, segments)
        return x

    def _longest_shared(self) -> int:
        """Of a causal model all, but for ropes that turn by a prompt's whole length where it is long."""
        spec = self.spec
        if not spec.causal or spec.alibi or self.relative is not None or spec.uncounted is not None:
            return 0
        by_length = [rope.original_length for rope in self.ropes if rope.scaling in ("dynamic", "longrope")]
        return min(by_length, default=sys.maxsize)

    def _bias(self, length: int) -> Tensor | None:
        if self.relative is not None:
            return relative_bias(self.relative, length)
        if self.spec.alibi:
            return alibi_bias(self.spec.heads, length, self.tokens.device)
        return None


class Block:
    """Attention and feed-forward, each added to what came in."""

    def __init__(self, spec: TransformerSpec, layer: LayerSpec, weights: Weights) -> None:
        self.attention = Attention(spec, layer, weights / "attn")
        self.feed_forward = _feed_forward(spec, layer, weights / "ffn")
        self.attn_in = norm_of(weights / "attn_in", spec)
        self.attn_out = norm_of(weights / "attn_out", spec)
        self.attn_post = norm_of(weights / "attn_post", spec)
        self.ffn_in = norm_of(weights / "ffn_in", spec)
        self.ffn_out = norm_of(weights / "ffn_out", spec)
        self.ffn_post = norm_of(weights / "ffn_post", spec)

    def __call__(
        self, x: Tensor, segments: Segments, ropes: Ropes, bias: Tensor | None, read: Read | None = None
    ) -> Tensor:
        """[total, hidden] in and out; with `read`, out come its rows alone."""
        mixed = self.attention.mix(x if self.attn_in is None else self.attn_in(x), segments, ropes, bias)
        if read is not None:
            x, mixed, segments = x[read.rows], mixed[read.rows], read.segments
        x = _add(x, self.attention.out, mixed, self.attn_out, segments)
        if self.attn_post is not None:
            x = self.attn_post(x)
        x = _add(x, self.feed_forward, x if self.ffn_in is None else self.ffn_in(x), self.ffn_out, segments)
        return x if self.ffn_post is None else self.ffn_post(x)


class Attention:
    """Multi-head attention; query, key and value come from one product."""

    def __init__(self, spec: TransformerSpec, layer: LayerSpec, weights: Weights) -> None:
        self.spec, self.layer = spec, layer
        self.qkv: Product = product_of(weights / "qkv")
        self.out: Product = product_of(weights / "out")
        self.q_norm, self.k_norm = norm_of(weights / "q_norm", spec), norm_of(weights / "k_norm", spec)
        query = spec.heads * spec.head_dim
        rest = self.qkv.out_features - query
        self.sizes = (query, rest // 2, rest // 2)

    def mix(self, x: Tensor, segments: Segments, ropes: Ropes, bias: Tensor | None) -> Tensor:
        """What `out` is applied to: [total, heads * head_dim]."""
        spec = self.spec
        q, k, v = (
            part.view(len(x), -1, spec.head_dim) for part in self.qkv(x, segments=segments).split(self.sizes, -1)
        )
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.layer.rope is not None:
            cos, sin = ropes[self.layer.rope]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        mixed = attend(
            q,
            k,
            v,
            segments,
            scale=scale,
            causal=spec.causal,
            window=self.layer.window,
            bias=bias,
            softcap=spec.softcap,
            # Products in int8 lose far more.
            coarse=isinstance(self.qkv, Int8Linear),
        )
        return mixed.flatten(1)


def _add(
    x: Tensor, layer: Product | FeedForward | Experts, inner: Tensor, norm: Norm | None, segments: Segments
) -> Tensor:
    """x plus the layer's answer to `inner`, which a norm may change before it is added."""
    if norm is None:
        return layer.add_to(x, inner, segments)
    return x + norm(layer(inner, segments=segments))


def blocks(spec: TransformerSpec, weights: Weights) -> list[Block]:
    """A block per layer; layers without weights of their own share (ALBERT)."""
    if weights / "layers.shared":
        shared = Block(spec, spec.layers[0], weights / "layers.shared")
        return [shared] * len(spec.layers)
    return [Block(spec, layer, weights / f"layers.{i}") for i, layer in enumerate(spec.layers)]


def _feed_forward(spec: TransformerSpec, layer: LayerSpec, weights: Weights) -> FeedForward | Experts:
    if not layer.experts:
        return FeedForward(product_of(weights / "up"), product_of(weights / "down"), spec.activation, spec.gated)
    router = weights / "router"
    # Both matrices of all experts lie below each other: [experts * intermediate, hidden].
    ups, downs = ((weights / name).weight.chunk(len(router.weight)) for name in ("expert_up", "expert_down"))
    experts = [
        FeedForward(
            *(_product(up, None, weights.int8), _product(down.T.contiguous(), None, weights.int8)),
            *(spec.activation, spec.gated),
        )
        for up, down in zip(ups, downs, strict=True)
    ]
    return Experts(linear_of(router), experts, (weights / "experts").bias, layer.experts)


def product_of(weights: Weights) -> Product:
    """A product of a block, in int8 where that was decided."""
    if weights.whole is not None:
        whole, steps = weights.whole
        return Int8Linear(whole, weights.bias, steps)
    return _product(weights.weight, weights.bias, weights.int8)


def linear_of(weights: Weights) -> Linear:
    """A product beside the blocks, in the type of the weights."""
    return _prepacked(weights.weight, weights.bias)


def _product(weight: Tensor, bias: Tensor | None, int8: bool) -> Product:
    return Int8Linear(weight, bias) if int8 else _prepacked(weight, bias)


def _prepacked(weight: Tensor, bias: Tensor | None = None) -> Linear:
    linear = Linear(weight, bias)
    linear.prepack()
    return linear


def _table(weights: Weights) -> Tensor | None:
    return weights.weight if weights else None


def norm_of(weights: Weights, spec: TransformerSpec) -> Norm | None:
    """A norm where the checkpoint has one, else nothing."""
    if not weights:
        return None
    if spec.norm == "layer":
        return LayerNorm(weights.weight, weights.bias, spec.norm_eps)
    return RMSNorm(weights.weight, spec.norm_eps, spec.norm)
