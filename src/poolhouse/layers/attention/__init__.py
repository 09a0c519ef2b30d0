"""Attention inside each sequence of a pack; `attend` chooses the backend.

reference.py is the definition that all backends are compared with.
"""

from __future__ import annotations

from torch import Tensor

from poolhouse.layers.attention import compiled, sdpa, varlen
from poolhouse.packing.pack import Segments


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    coarse: bool = False,
) -> Tensor:
    """Softmax attention of every token over those of its own sequence that are attended to (`Segments.attended`).

    A token that sees none gets zeros (a mask token far behind the text, in a window). Rows behind the last sequence are
    padding; their values are arbitrary.

    query: [total, heads, head_dim]; key, value: [total, kv_heads, head_dim], kv_heads a divisor of heads.
    window: tokens seen on each side, inclusive; None sees all.
    bias: [heads, longest, longest], added to the scores; a shorter sequence uses the top left corner.
    softcap: scores are squeezed to (-softcap, softcap) by tanh before the bias and the mask.
    coarse: whether float32 may be multiplied in bfloat16, with sums in float32, where that is quicker.
    Returns [total, heads, head_dim].
    """
    if query.is_cuda:
        limited = segments.attended is not None and (causal or window is not None)
        if varlen.can_run(query, bias, softcap, limited):
            return varlen.attend(query, key, value, segments, scale=scale, causal=causal, window=window)
    elif compiled.can_run(query, key, scale, softcap):
        return compiled.attend(
            query, key, value, segments, scale=scale, causal=causal, window=window, bias=bias, coarse=coarse
        )
    return sdpa.attend(
        query, key, value, segments, scale=scale, causal=causal, window=window, bias=bias, softcap=softcap
    )


__all__ = ["attend"]
