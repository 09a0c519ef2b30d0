"""Reductions: from a row per token to one per prompt, by the public pooling names; sums are in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.pooling.rows import Rows

Reduction = Callable[[Rows], Tensor]


def cls(rows: Rows) -> Tensor:
    """The first row of each prompt."""
    return rows.values[rows.first].float()


def last(rows: Rows) -> Tensor:
    """The last row of each prompt."""
    return rows.values[rows.segments.last_tensor].float()


def mean(rows: Rows) -> Tensor:
    """The mean of each prompt's rows."""
    total, lengths = _sum(rows)
    return total / lengths


def mean_sqrt_len(rows: Rows) -> Tensor:
    """The sum divided by the root of the length, as in sentence-transformers."""
    total, lengths = _sum(rows)
    return total / lengths.sqrt()


def largest(rows: Rows) -> Tensor:
    """The maximum of each feature."""
    values, _, lengths = rows.pooled()
    return torch.segment_reduce(values, "max", lengths=lengths)


def weighted_mean(rows: Rows) -> Tensor:
    """The mean weighted by position, 1 for the first token (SGPT, Muennighoff 2022)."""
    values, positions, lengths = rows.pooled()
    weights = (positions + 1).float()[:, None]
    return _sums(values * weights, lengths) / _sums(weights, lengths).clamp(min=1e-9)


# The public names, upper case as in vLLM; several joined by "+" are concatenated.
REDUCTIONS: dict[str, Reduction] = {
    "CLS": cls,
    "LAST": last,
    "MEAN": mean,
    "MAX": largest,
    "WEIGHTEDMEAN": weighted_mean,
    "MEAN_SQRT_LEN": mean_sqrt_len,
}


def _sum(rows: Rows) -> tuple[Tensor, Tensor]:
    """Sum of each prompt's rows, and their number, never 0: [prompts, features] and [prompts, 1]."""
    if len(rows.segments) == 1 and rows.skip is None:
        lengths = rows.segments.lengths_tensor[:, None].clamp(min=1)
        return rows.values.sum(0, keepdim=True, dtype=torch.float32), lengths.float()
    values, _, lengths = rows.pooled()
    return _sums(values, lengths), lengths[:, None].clamp(min=1).float()


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """The sum of each run of rows: an embedding bag over the rows themselves is the quickest sum that torch has."""
    return F.embedding_bag(
        torch.arange(len(values), device=values.device), values, lengths.cumsum(0) - lengths, mode="sum"
    )
