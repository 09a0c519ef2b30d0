"""Reference: the definition of attention over a pack, one sequence at a time; slow, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from poolhouse.packing.pack import NO_PREFIX, Segments


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
    counts = segments.attended or segments.lengths
    prefixes = segments.prefixes or (NO_PREFIX,) * len(segments)
    for start, end, count, prefix in zip(segments.starts, segments.ends, counts, prefixes, strict=True):
        length, before = end - start, prefix.length
        seen = [*range(prefix.start, prefix.start + before), *range(start, start + count)]
        keys = len(seen)
        q = query[start:end].transpose(0, 1).double()
        k = key[seen].transpose(0, 1).double().repeat_interleave(group, 0)
        v = value[seen].transpose(0, 1).double().repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, before : before + length, :keys].double()
        visible = visible_mask(length, causal, window, query.device, keys, before)
        weights = scores.softmax(-1) if visible is None else masked_softmax(scores, visible)
        out[start:end] = (weights @ v).transpose(0, 1).to(out.dtype)
    return out


def visible_mask(
    length: int, causal: bool, window: int | None, device: torch.device, keys: int | None = None, before: int = 0
) -> Tensor | None:
    """[length, keys], true where a token (row) sees another (column); None where all see all.

    keys: how many leading tokens are attended to, those of a prefix included; None: all. before: tokens of the prefix.
    """
    if not causal and (window is None or window >= before + length - 1):
        return None
    index = torch.arange(before + length, device=device)
    ahead = index[None, :keys] - index[before:, None]
    visible = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        visible = visible & (ahead.abs() <= window)
    return visible


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over what is visible; zeros for a token that sees none."""
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)
