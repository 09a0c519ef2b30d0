"""Adapted layers: low-rank changes of weights (LoRA), chosen per row of a pack.

An adapter changes a weight W to W + up @ down. A merged adapter is added to W once. An adapter per request owns some rows
of the pack (`Segments.adapter_rows`), and only those rows are also multiplied by `down` and `up`.
Source: Hu et al. 2021 (LoRA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.layers.feed_forward import ACTIVATIONS
from poolhouse.layers.linear import Product
from poolhouse.packing.pack import Segments


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The change `up @ down` of a weight [rows, columns]; of a table of vectors just as of a linear layer.

    up: [rows, rank], with the adapter's scale. down: [rank, columns].
    """

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> Tensor:
        """[rows, columns], float32."""
        return self.up.float() @ self.down.float()

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        return LowRank(self.up.to(device, dtype).contiguous(), self.down.to(device, dtype).contiguous())


class AdaptedLinear:
    """A linear layer with another weight for the rows of adapters."""

    def __init__(self, linear: Product) -> None:
        self.linear = linear
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.changes: dict[str, LowRank] = {}

    def padded_rows(self, count: int) -> int:
        """See `Linear.padded_rows`."""
        return self.linear.padded_rows(count)

    def __call__(self, x: Tensor, activation: str = "none", segments: Segments | None = None) -> Tensor:
        """[total, in] -> [total, out]; `activation` is one of `fusable`."""
        if segments is None or not segments.adapter_rows:
            return self.linear(x, activation)
        y = self._change(self.linear(x), x, segments)
        return y if activation == "none" else ACTIVATIONS[activation](y)

    def add_to(self, residual: Tensor, x: Tensor, segments: Segments | None = None) -> Tensor:
        """residual + self(x)."""
        y = self.linear.add_to(residual, x)
        return y if segments is None else self._change(y, x, segments)

    def _change(self, y: Tensor, x: Tensor, segments: Segments) -> Tensor:
        for name, start, end in segments.adapter_rows:
            change = self.changes.get(name)
            if change is not None:
                y[start:end].addmm_(F.linear(x[start:end], change.down), change.up.T)
        return y


class AdaptedTable:
    """What adapters add to the vectors of a table (token, type or position embeddings)."""

    def __init__(self) -> None:
        self.changes: dict[str, LowRank] = {}

    def add_to(self, x: Tensor, ids: Tensor | None, segments: Segments) -> None:
        """Add to x, in place, what the adapters change in the rows `ids` of the table; None stands for row 0.

        x: [total, columns]; ids: [total].
        """
        for name, start, end in segments.adapter_rows:
            change = self.changes.get(name)
            if change is not None:
                up = change.up[0] if ids is None else F.embedding(ids[start:end], change.up)
                x[start:end] += up @ change.down
