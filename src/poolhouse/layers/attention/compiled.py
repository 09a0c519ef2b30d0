"""Compiled: attention on CPUs by our own kernel, the whole pack in one call, whatever lengths, windows and groups it has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from poolhouse import kernels
from poolhouse.packing.pack import Segments

_ARGUMENTS = (
    *[kernels.ADDRESS] * 4,
    *[kernels.COUNT] * 8,
    kernels.ADDRESS,
    *[kernels.COUNT] * 6,
    *(kernels.REAL, kernels.ADDRESS),
    *[kernels.COUNT] * 3,
)
_TYPES = (torch.float32, torch.bfloat16)
# As attention.cpp has them.
_FLOAT32, _BFLOAT16, _COARSE = range(3)
# Widths of heads, and heads that share one of keys, for which the kernel has room.
_WIDEST, _MOST_SHARING = 256, 256


def can_run(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> bool:
    """The kernel takes float32 and bfloat16, heads of a multiple of 8 features, and no softcap."""
    return (
        query.device.type == "cpu"
        and query.dtype in _TYPES
        and softcap is None
        and query.shape[2] % 8 == 0
        and query.shape[2] <= _WIDEST
        and query.shape[1] <= _MOST_SHARING * key.shape[1]
        and scale > 0
        and _kernel() is not None
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    bias: Tensor | None = None,
    coarse: bool = False,
) -> Tensor:
    """See `poolhouse.layers.attention.attend`."""
    kernel = _kernel()
    assert kernel is not None
    # Heads may be views of a wider product; only the features of one head must lie side by side.
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    rows, heads, width = query.shape
    out = query.new_empty(rows, heads, width)
    table = segments.table
    bias = None if bias is None else bias.float().contiguous()
    kernel(
        *(x.data_ptr() for x in (query, key, value, out)),
        *(stride for x in (query, key, value, out) for stride in x.stride()[:2]),
        table.ctypes.data,
        len(table),
        heads,
        key.shape[1],
        width,
        -1 if window is None else window,
        causal,
        scale,
        None if bias is None else bias.data_ptr(),
        0 if bias is None else bias.shape[-1],
        _BFLOAT16 if query.dtype == torch.bfloat16 else _COARSE if coarse else _FLOAT32,
        torch.get_num_threads(),
    )
    if rows > segments.total:
        out[segments.total :] = 0
    return out


def _kernel() -> Callable[..., None] | None:
    return kernels.function("poolhouse_attention", *_ARGUMENTS)
