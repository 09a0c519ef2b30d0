"""Position biases that are added to attention scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_bias(table: Tensor, length: int, max_distance: int = 128) -> Tensor:
    """T5's bucketed bias: [heads, length, length] from a table [buckets, heads].

    The bias of a shorter sequence is the top left corner. Source: Raffel et al. 2020; MPNet uses the same buckets.
    """
    place = torch.arange(length, device=table.device)
    buckets = _buckets(place[None] - place[:, None], table.shape[0], max_distance)
    return table[buckets].permute(2, 0, 1)


def alibi_bias(heads: int, length: int, device: torch.device) -> Tensor:
    """Symmetric ALiBi: [heads, length, length], minus slope times distance. Source: Press et al. 2022."""
    place = torch.arange(length, device=device)
    distance = (place[None] - place[:, None]).abs()
    return -distance * torch.tensor(alibi_slopes(heads), device=device)[:, None, None]


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head; head counts that are no power of two borrow from the next one."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


def _buckets(relative: Tensor, buckets: int, max_distance: int) -> Tensor:
    half = buckets // 2
    exact = half // 2
    side = (relative > 0).long() * half
    distance = relative.abs()
    grown = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + grown.long()).clamp(max=half - 1)
    return side + torch.where(distance < exact, distance, far)
