"""SPLADE and sparse autoencoders: steps that turn a text into weights of vocabulary entries or features.

Source of SPLADE: Formal et al. 2021, SPLADE v2 (arXiv 2109.10086); the second logarithm: Geng et al. 2024 (arXiv 2411.04403).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import Rows
from poolhouse.pooling.steps import Dense, Step

# Rows whose logits exist at a time; a row is as wide as the vocabulary.
_ROWS = 512


@dataclass(frozen=True, slots=True)
class SpladePooling:
    """How token weights become weights of a text. logarithms: how many times log(1 + x) is applied to positive logits."""

    strategy: Literal["max", "sum"] = "max"
    logarithms: int = 1


@dataclass(frozen=True, slots=True)
class Saturate(Step):
    """log(1 + positive part) of each number, applied `logarithms` times."""

    logarithms: int

    @property
    def description(self) -> str:
        return "relu" + " > log1p" * self.logarithms

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values(_saturated(rows.values, self.logarithms))


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyWeights(Step):
    """One weight per vocabulary entry and prompt: the largest, or the sum, of its tokens' weights for that entry.

    decoder: to logits; None where the rows are logits.
    """

    decoder: Dense | None
    pooling: SpladePooling

    @property
    def description(self) -> str:
        dense = "" if self.decoder is None else f"{self.decoder.description} > "
        return f"{dense}{Saturate(self.pooling.logarithms).description} > {self.pooling.strategy}"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        starts, ends = rows.segments.starts, rows.segments.ends
        pooled: list[Tensor] = []
        for first, last in _groups(starts, ends):
            offset = starts[first]
            logits = rows.values[offset : ends[last]]
            if self.decoder is not None:
                logits = F.linear(logits, self.decoder.weight, self.decoder.bias)
            if self.pooling.strategy == "sum":
                logits = _saturated(logits, self.pooling.logarithms)
            for index in range(first, last + 1):
                own = logits[starts[index] - offset : ends[index] - offset]
                pooled.append(own.sum(0) if self.pooling.strategy == "sum" else own.amax(0))
        values = torch.stack(pooled)
        # The function is monotonic, so the largest weight is that of the largest logit.
        return rows.one_each(values if self.pooling.strategy == "sum" else _saturated(values, self.pooling.logarithms))


def _saturated(logits: Tensor, logarithms: int) -> Tensor:
    weights = logits.relu()
    for _ in range(logarithms):
        weights = weights.log1p()
    return weights


def _groups(starts: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last prompt of groups of about `_ROWS` rows; a longer prompt is a group by itself."""
    first = 0
    for index in range(1, len(starts) + 1):
        if index == len(starts) or ends[index] - starts[first] > _ROWS:
            yield first, index - 1
            first = index


@dataclass(frozen=True, slots=True)
class KeepLargest(Step):
    """The `count` features of each row that are furthest from 0; the others become 0."""

    count: int

    @property
    def description(self) -> str:
        return f"largest {self.count}"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        if self.count >= rows.values.shape[-1]:
            return rows
        largest = rows.values.abs().topk(self.count, dim=-1).indices
        return rows.with_values(torch.zeros_like(rows.values).scatter(-1, largest, rows.values.gather(-1, largest)))


@dataclass(frozen=True, slots=True, eq=False)
class SparseEncoder(Step):
    """A sparse autoencoder: the positive ones among the `count` largest of weight @ (values - shift) + bias.

    standardise: each row gets mean 0 and standard deviation 1 first.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    count: int
    standardise: bool = False

    @property
    def description(self) -> str:
        first = "standardise > " if self.standardise else ""
        return f"{first}autoencoder {self.weight.shape[0]} > largest {self.count} relu"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        values = rows.values
        if self.standardise:
            values = values - values.mean(-1, keepdim=True)
            values = values / (values.std(-1, keepdim=True) + 1e-5)
        features = F.linear(values - self.shift, self.weight, self.bias)
        largest = features.topk(min(self.count, features.shape[-1]), dim=-1)
        return rows.with_values(torch.zeros_like(features).scatter(-1, largest.indices, largest.values.relu()))
