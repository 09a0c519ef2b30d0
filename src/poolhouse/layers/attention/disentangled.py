"""DeBERTa's attention: scores from content and from relative positions, which see each other's tokens.

score(i, j) = query_i . key_j + query_i . position_key(j - i) + key_j . position_query(i - j)

Source: He et al. 2021, DeBERTa: Decoding-enhanced BERT with Disentangled Attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.packing.segments import Segments

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
    Row longest - 1 + n of both answers a token that is n places ahead of the one that asks: of the query that looks at a
    key (position_key), of the key that is looked at by a query (position_query).
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
    most = _SCORES_PER_CALL.get(device, 2**22)
    calls: list[tuple[int, int, int]] = []
    for start, count, length, _ in segments.runs:
        together = max(1, most // (heads * length * length))
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
    from_query = None if position_key is None else _by_place(query, position_key, count, length)
    from_key = None if position_query is None else _by_place(key, position_query, count, length).transpose(-1, -2)
    if from_query is None or from_key is None:
        return from_key if from_query is None else from_query
    return from_query + from_key


def _by_place(asking: Tensor, table: Tensor, count: int, length: int) -> Tensor:
    """asking_i . table(j - i) for all places i, j of each sequence: a view [heads, count, length, length]."""
    heads, ahead = asking.shape[1], 2 * length - 1
    rows = table.narrow(0, (len(table) - ahead) // 2, ahead)
    products = torch.bmm(asking.transpose(0, 1), rows.permute(1, 2, 0))
    # products[i, length - 1 + n] belongs to (i, i + n): each row starts one place further left, which strides can say.
    strides = (count * length * ahead, length * ahead, ahead - 1, 1)
    return products.as_strided((heads, count, length, length), strides, length - 1)
