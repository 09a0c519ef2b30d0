"""SDPA: attention by torch's own kernel, on any device; sequences of equal length in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.layers.attention.reference import masked_softmax, visible_mask
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
) -> Tensor:
    """See `poolhouse.layers.attention.attend`."""
    group = query.shape[1] // key.shape[1]
    if group > 1 and query.device.type == "cpu":
        # The CPU kernel has no grouped heads of its own and falls to a slow path.
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        group = 1
    parts = []
    for start, count, length, keys in segments.runs:
        q, k, v = (_heads_first(x, start, count, length) for x in (query, key, value))
        k, v = k[:, :, :keys], v[:, :, :keys]
        # The kernel's own way to be causal is for as many keys as queries.
        masked = (window is not None and window < length - 1) or (causal and keys < length)
        if softcap is not None:
            out = _capped(q, k, v, scale, causal, window, bias, softcap)
        elif bias is None and not masked:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=group > 1)
        else:
            mask = _mask(length, keys, causal, window, bias, query)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=group > 1)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    if len(query) > segments.total:
        parts.append(query[segments.total :])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _heads_first(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """[total, heads, head_dim] -> a view of some rows as [count, heads, length, head_dim]."""
    rows = x if len(x) == count * length else x.narrow(0, start, count * length)
    return rows.view(count, length, *x.shape[1:]).transpose(1, 2)


def _mask(length: int, keys: int, causal: bool, window: int | None, bias: Tensor | None, like: Tensor) -> Tensor | None:
    """What to add to the scores, or which of them to keep."""
    visible = visible_mask(length, causal, window, like.device, keys)
    if bias is None:
        return visible
    corner = bias[:, :length, :keys].to(like.dtype)
    return corner if visible is None else corner.masked_fill(~visible, -torch.inf)


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    softcap: float,
) -> Tensor:
    """Gemma 2 squeezes scores by tanh, which no fused kernel here does."""
    group, length, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
    if bias is not None:
        scores = scores + bias[:, :length, :keys]
    visible = visible_mask(length, causal, window, q.device, keys)
    weights = scores.float().softmax(-1) if visible is None else masked_softmax(scores.float(), visible)
    return weights.to(v.dtype) @ v
