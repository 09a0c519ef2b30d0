"""Sparse autoencoder: a dense vector as a few large features of a wide layer.

Source: Wen et al. 2025, Beyond Matryoshka (arXiv 2503.01776), as sentence-transformers' SparseAutoEncoder computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.params import PoolingParams
from poolhouse.pooling.module_tensors import module_tensors
from poolhouse.pooling.rows import Rows


@dataclass(frozen=True, slots=True)
class KeepLargest:
    """The `count` features of each row that are furthest from 0; the others become 0."""

    count: int

    @property
    def words(self) -> str:
        return f"largest {self.count}"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        if self.count >= rows.values.shape[-1]:
            return rows
        places = rows.values.abs().topk(self.count, dim=-1).indices
        return rows.with_values(torch.zeros_like(rows.values).scatter(-1, places, rows.values.gather(-1, places)))

    def to(self, device: torch.device) -> KeepLargest:
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Encode:
    """The positive ones among the `count` largest of weight @ (values - shift) + bias.

    standardise: each row gets mean 0 and standard deviation 1 first.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    count: int
    standardise: bool = False

    @property
    def words(self) -> str:
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

    def to(self, device: torch.device) -> Encode:
        weight, bias, shift = (tensor.to(device) for tensor in (self.weight, self.bias, self.shift))
        return Encode(weight, bias, shift, self.count, self.standardise)


def sparse_autoencoder(config: Mapping[str, Any], place: Path) -> Encode:
    """The encoder of a SparseAutoEncoder module; its decoder serves training only.

    Raises:
        CheckpointError: tensors that are missing or do not fit together.
    """
    tensors = module_tensors(place)
    # The decoder is the encoder transposed, and a file holds one of the two names.
    tensors.setdefault("encoder.weight", tensors.get("decoder.linear.weight", torch.empty(0)))
    names = ("encoder.weight", "latent_bias", "pre_bias")
    missing = [name for name in names if name not in tensors or not tensors[name].numel()]
    if missing:
        raise CheckpointError(f"{place}: a SparseAutoEncoder needs {missing}; there is {sorted(tensors)}.")
    weight, bias, shift = (tensors[name].float() for name in names)
    if weight.shape != (len(bias), len(shift)):
        raise CheckpointError(f"{place}: encoder.weight is {list(weight.shape)}, beside {len(bias)} and {len(shift)}.")
    count = config.get("k", 8)
    if type(count) is not int or count < 1:
        raise CheckpointError(f"{place}: k must be at least 1, got {count!r}.")
    return Encode(weight, bias, shift, count, bool(config.get("normalize", False)))


def with_count(encode: Encode, count: int) -> Encode:
    """The same step with as many features as the whole model is said to give."""
    return replace(encode, count=count)
