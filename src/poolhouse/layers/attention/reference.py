"""The definition of attention over a pack, one sequence at a time; slow, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from poolhouse.segments import Segments


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
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    for start, end in zip(segments.starts, segments.ends, strict=True):
        length = end - start
        q = query[start:end].transpose(0, 1).double()
        k = key[start:end].transpose(0, 1).double().repeat_interleave(group, 0)
        v = value[start:end].transpose(0, 1).double().repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, :length, :length].double()
        visible = visible_mask(length, causal, window, query.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
    return out


def visible_mask(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """[length, length], true where a token (row) sees another (column); None where all see all."""
    if not causal and (window is None or window >= length - 1):
        return None
    place = torch.arange(length, device=device)
    ahead = place[None] - place[:, None]
    visible = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        visible = visible & (ahead.abs() <= window)
    return visible
