"""SDPA: attention by torch's own kernel, on any device; sequences of equal length in one call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.layers.attention.reference import masked_softmax, visible_mask
from poolhouse.packing.pack import NO_PREFIX, Prefix, Run, Segments

# What scaled_dot_product_attention calls on a CPU; it alone tells the sums.
_FLASH_FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # noqa: SLF001


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
    parts = []
    plain = query.device.type == "cpu" and causal and bias is None and softcap is None
    for prefix, alike in groupby(segments.runs, key=lambda run: run.prefix):
        runs = list(alike)
        reach = prefix.length + max(run.length for run in runs) - 1
        if prefix.length and plain and segments.attended is None and (window is None or window >= reach):
            parts.append(_behind(prefix, runs, query, key, value, scale))
        else:
            parts.extend(_run(run, query, key, value, scale, causal, window, bias, softcap) for run in runs)
    if len(query) > segments.total:
        parts.append(query[segments.total :])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _run(
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Sequences of equal length, the keys of each behind those of its prefix: [rows, heads, head_dim]."""
    start, count, length, keys, (first, before) = run
    grouped = query.shape[1] > key.shape[1]
    q, k, v = (_heads_first(x, start, count, length) for x in (query, key, value))
    k, v = k[:, :, :keys], v[:, :, :keys]
    if before:
        k, v = (
            torch.cat((_heads_first(x, first, 1, before).expand(count, -1, -1, -1), own), 2)
            for x, own in ((key, k), (value, v))
        )
        keys += before
    # The kernel's own way to be causal is for as many keys as queries.
    masked = (window is not None and window < before + length - 1) or (causal and (before > 0 or keys < length))
    if softcap is not None:
        out = _capped(q, k, v, scale, causal, window, bias, softcap, before)
    elif bias is None and not masked:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    else:
        mask = _mask(length, keys, causal, window, bias, query, before)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


def _behind(prefix: Prefix, runs: Sequence[Run], query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Neighbouring sequences behind one prefix, causal: [rows, heads, head_dim].

    All their rows see all of the prefix, which is one call without a copy or a mask. Among themselves they are sequences
    like others. Both answers are joined by their shares of the softmax, which the kernel tells as logarithms of sums.
    """
    heads, rows = query.shape[1], sum(run.sequences * run.length for run in runs)

    def part(keys: Run, start: int, sequences: int, length: int, causal: bool) -> tuple[Tensor, Tensor]:
        q = _heads_first(query, start, sequences, length)
        k, v = (_heads_first(x, *keys[:3]) for x in (key, value))
        return _with_sums(q, k, v, scale, causal)

    whole = Run(prefix.start, 1, prefix.length, prefix.length, NO_PREFIX)
    common, common_sums = part(whole, runs[0].start, 1, rows, causal=False)
    parts = [part(run, run.start, run.sequences, run.length, causal=True) for run in runs]
    own, own_sums = (torch.cat(both) for both in zip(*parts, strict=True))
    share = torch.sigmoid(common_sums - own_sums).to(query.dtype)
    return torch.lerp(own, common, share.view(rows, heads, 1))


def _with_sums(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of [count, heads, length, head_dim], as rows, and each row's logarithm of its sum: [rows, heads]."""
    out, sums = _FLASH_FOR_CPU(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2).flatten(0, 1), sums.transpose(1, 2).flatten(0, 1)


def _heads_first(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """[total, heads, head_dim] -> a view of some rows as [count, heads, length, head_dim]."""
    rows = x if len(x) == count * length else x.narrow(0, start, count * length)
    return rows.view(count, length, *x.shape[1:]).transpose(1, 2)


def _mask(
    length: int, keys: int, causal: bool, window: int | None, bias: Tensor | None, like: Tensor, before: int
) -> Tensor | None:
    """What to add to the scores, or which of them to keep. before: leading keys of a prefix."""
    visible = visible_mask(length, causal, window, like.device, keys, before)
    if bias is None:
        return visible
    corner = bias[:, before : before + length, :keys].to(like.dtype)
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
    before: int,
) -> Tensor:
    """Gemma 2 squeezes scores by tanh, which no fused kernel here does."""
    group, length, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
    if bias is not None:
        scores = scores + bias[:, before : before + length, :keys]
    visible = visible_mask(length, causal, window, q.device, keys, before)
    weights = scores.float().softmax(-1) if visible is None else masked_softmax(scores.float(), visible)
    return weights.to(v.dtype) @ v
