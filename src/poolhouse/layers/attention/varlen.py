"""Varlen: attention by torch's variable-length kernel: CUDA, half precision, one call for the whole pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poolhouse.packing.pack import Segments


def can_run(query: Tensor, bias: Tensor | None, softcap: float | None, limited: bool = False) -> bool:
    """Flash kernels take half types, heads up to 256 wide, no bias and no softcap.

    limited: causal or windowed over a part of the tokens, where flash kernels count the limits from its end.
    """
    return (
        query.is_cuda
        and not limited
        and query.dtype in (torch.float16, torch.bfloat16)
        and bias is None
        and softcap is None
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, causal: bool, window: int | None
) -> Tensor:
    """See `poolhouse.layers.attention.attend`."""
    from torch.nn.attention.varlen import varlen_attn

    right = 0 if causal else -1
    bounds, longest = segments.cumulative, segments.longest
    if segments.attended is not None or segments.prefixes is not None:
        # The kernel counts causality and windows from the end of the keys, which is where a rest lies behind its prefix.
        rows, bounds, longest = segments.keys
        key, value = key[rows], value[rows]
    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    out = varlen_attn(
        query,
        key,
        value,
        segments.cumulative,
        bounds,
        segments.longest,
        longest,
        scale=scale,
        window_size=(-1, right) if window is None else (window, 0 if causal else window),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out
