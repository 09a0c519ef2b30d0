"""Few rows: all blocks of a Transformer over a short pack by one call of a kernel, in the thread that calls it.

A query of ten tokens is a hundred operators, each of which takes longer to call than to compute. The kernel reads the
weights where oneDNN or `Int8Linear` laid them out, so nothing is held twice. It takes what most encoders are: see
`FewRows.of`. All else, and longer packs, go block by block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poolhouse import kernels
from poolhouse.layers.feed_forward import FeedForward
from poolhouse.layers.int8 import Int8Linear
from poolhouse.layers.linear import Linear
from poolhouse.layers.norm import LayerNorm, Norm, RMSNorm
from poolhouse.layers.positions import RopeSpec
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.packing.pack import Segments

if TYPE_CHECKING:
    from poolhouse.models.native.transformer import Block

# A pack of no more rows is run so. Beyond, oneDNN's products catch up; with AMX, which only it uses, they do so sooner: 9
# tokens of MiniLM take 2.4 against 4.9 ms block by block, and 32 take 5.9 against 4.7.
_MOST_ROWS, _MOST_BESIDE_AMX = 64, 16
# As in team.h.
_MOST_HELPERS = 3
# The numbers of the types of weights, as blocks.cpp has them.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Floats that one of its registers holds; heads for which its attention has room.
_WIDTH, _MOST_HEADS = 16, 256

_ADDRESS, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, _ADDRESS) for name in ("weight", "bias", "steps", "totals")),
        *((name, _COUNT) for name in ("out", "inputs", "panel")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _ADDRESS), ("bias", _ADDRESS))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("qkv", "out", "up", "down")),
        *((name, _Norm) for name in ("attn_in", "attn_post", "ffn_in", "ffn_post", "query", "key")),
        ("cosines", _ADDRESS),
        ("sines", _ADDRESS),
        ("window", _COUNT),
    )


class _Spec(ctypes.Structure):
    _fields_ = (
        *((name, _COUNT) for name in ("hidden", "heads", "kv_heads", "head_dim", "rotated", "inner", "activation")),
        *((name, _COUNT) for name in ("gated", "causal", "root_mean_square", "type")),
        ("eps", _REAL),
        ("scale", _REAL),
    )


class FewRows:
    """The blocks of one Transformer, as the kernel reads them.

    rows: of a pack that it takes, at most. helpers: threads that help it at most.
    """

    helpers = _MOST_HELPERS

    def __init__(
        self, kernel: Callable[..., None], spec: TransformerSpec, layers: Sequence[Block], dtype: torch.dtype
    ) -> None:
        self._kernel, self._layers = kernel, layers
        beside_amx = dtype == torch.bfloat16 and "amx_bf16" in kernels.cpu_flags()
        self.rows = _MOST_BESIDE_AMX if beside_amx else _MOST_ROWS
        # What the kernel reads besides weights: floats, which live as long as this.
        self._kept: list[Tensor] = []
        first = layers[0]
        feed_forward = first.feed_forward
        assert isinstance(feed_forward, FeedForward)
        _, key, _ = first.attention.sizes
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        rotated = max((layer.rope.dim for layer in spec.layers if layer.rope is not None), default=0)
        self._spec = _Spec(
            first.attention.qkv.in_features,
            spec.heads,
            key // spec.head_dim,
            spec.head_dim,
            rotated,
            feed_forward.down.in_features,
            kernels.ACTIVATIONS[feed_forward.name],
            spec.gated,
            spec.causal,
            spec.norm != "layer",
            _TYPES[dtype],
            spec.norm_eps,
            scale,
        )
        self._blocks = (_Block * len(layers))(*(self._block(layer) for layer in layers))

    def takes(self, segments: Segments) -> bool:
        """Whether this is for the kernel: few rows of whole sequences, all of which see each other and go without adapters.

        Not where torch has more threads here than would help the kernel.
        """
        return (
            segments.total <= self.rows
            and segments.attended is None
            and segments.prefixes is None
            and not segments.adapter_rows
            and torch.get_num_threads() <= 1 + kernels.helpers.count
        )

    @classmethod
    def of(cls, spec: TransformerSpec, layers: Sequence[Block]) -> FewRows | None:
        """None where the kernel cannot run these blocks, or there is none.

        It takes float32, bfloat16 and int8, of blocks whose products have multiples of 64 columns, laid out as it reads
        them; without experts, softcaps, norms on what is added, and changes by adapters.
        """
        kernel = _kernel()
        if kernel is None or spec.softcap is not None or spec.head_dim % _WIDTH or spec.heads > _MOST_HEADS:
            return None
        if spec.attention_scale is not None and spec.attention_scale <= 0:
            return None
        dtypes = {product.dtype for layer in layers for product in _products(layer)}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        if dtype not in _TYPES:
            return None
        if len({layer.rope.dim for layer in spec.layers if layer.rope is not None}) > 1:
            return None
        if not all(_is_plain(layer, spec) for layer in layers):
            return None
        return cls(kernel, spec, layers, dtype)

    def __call__(
        self, x: Tensor, segments: Segments, ropes: Mapping[RopeSpec, tuple[Tensor, Tensor]], bias: Tensor | None
    ) -> Tensor:
        """What the last block answers: [rows, hidden] like x, in its place where that is possible. Arguments as a block's."""
        blocks = self._blocks
        # What the kernel reads, kept until it is done.
        tables = {rope: (cos.float().contiguous(), sin.float().contiguous()) for rope, (cos, sin) in ropes.items()}
        if tables:
            # Another pack may run at the same time.
            blocks = type(blocks).from_buffer_copy(blocks)
            for block, layer in zip(blocks, self._layers, strict=True):
                if layer.attention.layer.rope is not None:
                    cos, sin = tables[layer.attention.layer.rope]
                    block.cosines, block.sines = cos.data_ptr(), sin.data_ptr()
        bias = None if bias is None else bias.float().contiguous()
        # x is a tensor of our own, which the blocks may change.
        hidden = x if x.dtype == torch.float32 and x.is_contiguous() else torch.empty(x.shape).copy_(x)
        self._kernel(
            ctypes.addressof(self._spec),
            ctypes.addressof(blocks),
            len(blocks),
            hidden.data_ptr(),
            len(x),
            segments.table.ctypes.data,
            len(segments),
            None if bias is None else bias.data_ptr(),
            segments.longest,
            kernels.helpers.count,
        )
        return hidden.to(x.dtype)

    def _block(self, layer: Block) -> _Block:
        attention, feed_forward = layer.attention, layer.feed_forward
        assert isinstance(feed_forward, FeedForward)
        window = attention.layer.window
        return _Block(
            *map(self._matrix, (attention.qkv, attention.out, feed_forward.up, feed_forward.down)),
            *map(self._norm, (layer.attn_in, layer.attn_post, layer.ffn_in, layer.ffn_post)),
            *map(self._norm, (attention.q_norm, attention.k_norm)),
            None,
            None,
            -1 if window is None else window,
        )

    def _matrix(self, linear: object) -> _Matrix:
        if isinstance(linear, Int8Linear):
            assert linear.panels is not None
            packed, steps, totals, bias = linear.panels
            return _Matrix(packed, bias, steps, totals, linear.out_features, linear.in_features, 64)
        assert isinstance(linear, Linear)
        assert linear.panels is not None
        address, columns = linear.panels
        return _Matrix(address, self._floats(linear.bias), None, None, linear.out_features, linear.in_features, columns)

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm(None, None)
        assert isinstance(norm, LayerNorm | RMSNorm)
        bias = norm.bias if isinstance(norm, LayerNorm) else None
        return _Norm(self._floats(norm.weight), self._floats(bias))

    def _floats(self, values: Tensor | None) -> int | None:
        if values is None:
            return None
        self._kept.append(values.float().contiguous())
        return self._kept[-1].data_ptr()


def _products(layer: Block) -> list[Linear | Int8Linear]:
    """Those that are plain, as all of a block are that the kernel takes."""
    attention, feed_forward = layer.attention, layer.feed_forward
    if not isinstance(feed_forward, FeedForward):
        return []
    products = (attention.qkv, attention.out, feed_forward.up, feed_forward.down)
    return [product for product in products if isinstance(product, Linear | Int8Linear)]


def _is_plain(layer: Block, spec: TransformerSpec) -> bool:
    attention, feed_forward, rope = layer.attention, layer.feed_forward, layer.attention.layer.rope
    return (
        len(_products(layer)) == 4
        and all(product.panels is not None for product in _products(layer))
        and isinstance(feed_forward, FeedForward)
        and feed_forward.name in kernels.ACTIVATIONS
        and feed_forward.down.in_features % 64 == 0
        and layer.attn_out is None
        and layer.ffn_out is None
        and (rope is None or rope.dim % (2 * _WIDTH) == 0)
        and all(_is_known(norm, spec) for norm in (layer.attn_in, layer.attn_post, layer.ffn_in, layer.ffn_post))
        and all(_is_known(norm, spec) for norm in (attention.q_norm, attention.k_norm))
    )


def _is_known(norm: Norm | None, spec: TransformerSpec) -> bool:
    kind = LayerNorm if spec.norm == "layer" else RMSNorm
    return norm is None or (isinstance(norm, kind) and norm.eps == spec.norm_eps)


@cache
def _kernel() -> Callable[..., None] | None:
    asked = kernels.function("poolhouse_blocks_run", kernels.ADDRESS)
    if asked is None:
        return None
    answer = ctypes.c_int64(0)
    asked(ctypes.addressof(answer))
    if not answer.value:
        return None
    arguments = (*[kernels.ADDRESS] * 2, *[kernels.COUNT, kernels.ADDRESS] * 3, *[kernels.COUNT] * 2)
    return kernels.function("poolhouse_blocks", *arguments)
