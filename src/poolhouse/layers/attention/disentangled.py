"""Disentangled attention of DeBERTa: scores from content and from relative positions.

score(i, j) = query_i . key_j + query_i . position_key(j - i) + key_j . position_query(i - j)

Source: He et al. 2021, DeBERTa: Decoding-enhanced BERT with Disentangled Attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.packing.pack import Segments

# Scores of one call, about: long sequences of equal length are split, so that their tables of scores stay in caches.
_SCORES_PER_CALL = {"cpu": 2**22, "cuda": 2**27}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    position_key: Tensor | None,
    position_query: Tensor | None,
) -> Tensor:
    """Softmax attention of every token over its own sequence.

    query, key, value: [total, heads, head_dim].
    position_key, position_query: [2 * longest - 1, heads, head_dim], scaled already, or None where a term is not in use.
    Row longest - 1 + n is for a token n positions ahead: of the query, where position_key is multiplied with queries; of
    the key, where position_query is multiplied with keys.
    scale: factor on query . key. Returns [total, heads, head_dim].
    """
    parts = []
    for start, count, length in _calls(segments, query.shape[1], query.device.type):
        rows = slice(start, start + count * length)
        q, k, v = (_heads_first(x[rows], count, length) for x in (query, key, value))
        bias = _bias(query[rows], key[rows], position_key, position_query, count, length)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        parts.append(out.permute(1, 2, 0, 3).flatten(0, 1))
    if len(query) > segments.total:
        parts.append(query[segments.total :])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def log_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """DeBERTa v2's buckets of signed distances: exact when near, logarithmic when far. int64 in, int64 out.

    buckets: on each side. max_distance: where the logarithm reaches the last bucket.
    """
    half = buckets // 2
    far = distance.abs().clamp(min=half)
    # In this order of operations, since a rounded logarithm decides where a bucket ends.
    whole = torch.log(torch.tensor((max_distance - 1) / half, device=distance.device))
    grown = torch.ceil(torch.log(far / half) / whole * (half - 1)) + half
    return torch.where(distance.abs() <= half, distance, grown.long() * distance.sign())


def _calls(segments: Segments, heads: int, device: str) -> list[tuple[int, int, int]]:
    """Neighbouring sequences of equal length that are computed together: (first row, how many, their length)."""
    max_scores = _SCORES_PER_CALL.get(device, 2**22)
    calls: list[tuple[int, int, int]] = []
    for start, count, length, *_ in segments.runs:
        together = max(1, max_scores // (heads * length * length))
        firsts = range(0, count, together)
        calls.extend((start + first * length, min(together, count - first), length) for first in firsts)
    return calls


def _heads_first(x: Tensor, count: int, length: int) -> Tensor:
    """[count * length, heads, head_dim] -> a view [heads, count, length, head_dim]."""
    return x.view(count, length, *x.shape[1:]).permute(2, 0, 1, 3)


def _bias(
    query: Tensor,
    key: Tensor,
    position_key: Tensor | None,
    position_query: Tensor | None,
    count: int,
    length: int,
) -> Tensor | None:
    """What relative positions add to the scores: [heads, count, length, length]."""
    from_query = None if position_key is None else _by_position(query, position_key, count, length)
    from_key = None if position_query is None else _by_position(key, position_query, count, length).transpose(-1, -2)
    if from_query is None or from_key is None:
        return from_key if from_query is None else from_query
    return from_query + from_key


def _by_position(x: Tensor, table: Tensor, count: int, length: int) -> Tensor:
    """x_i . table(j - i) for all positions i, j of each sequence: a view [heads, count, length, length]."""
    heads, width = x.shape[1], 2 * length - 1
    rows = table.narrow(0, (len(table) - width) // 2, width)
    products = torch.bmm(x.transpose(0, 1), rows.permute(1, 2, 0))
    # products[i, length - 1 + n] belongs to (i, i + n). For length 3, with the entries that row i uses in brackets:
    #
    #     i = 0    -2   -1  [ 0   +1   +2]
    #     i = 1    -2  [-1    0   +1]  +2
    #     i = 2   [-2   -1    0]  +1   +2
    #
    # Each row starts one entry further left, so a row stride of width - 1 gives the square without a copy.
    strides = (count * length * width, length * width, width - 1, 1)
    return products.as_strided((heads, count, length, length), strides, length - 1)
