"""Low-rank changes of weights, chosen per row of a pack.

An adapter changes a weight W to W + up @ down. Merged, that is a sum; per request, each adapter owns a span of rows, and
only those rows take the detour through `down` and `up`. Source: Hu et al. 2021 (LoRA).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.layers.feed_forward import ACTIVATIONS
from poolhouse.layers.linear import Product

# Rows [start, end) of a pack that belong to the adapter of that name.
Span = tuple[str, int, int]


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


class ActiveSpans(threading.local):
    """Which rows of this thread's pack belong to which adapter; a model's adapted layers share one."""

    spans: Sequence[Span] = ()


class AdaptedLinear:
    """A linear layer whose weight some rows see changed."""

    def __init__(self, linear: Product, active: ActiveSpans) -> None:
        self.linear, self.active = linear, active
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.changes: dict[str, LowRank] = {}

    def padded_rows(self, count: int) -> int:
        """See `Linear.padded_rows`."""
        return self.linear.padded_rows(count)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """[total, in] -> [total, out]; `activation` is one of `fusable`."""
        if not self.active.spans:
            return self.linear(x, activation)
        y = self._change(self.linear(x), x)
        return y if activation == "none" else ACTIVATIONS[activation](y)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x)."""
        return self._change(self.linear.add_to(residual, x), x)

    def _change(self, y: Tensor, x: Tensor) -> Tensor:
        for name, start, end in self.active.spans:
            change = self.changes.get(name)
            if change is not None:
                y[start:end].addmm_(F.linear(x[start:end], change.down), change.up.T)
        return y


class AdaptedTable:
    """What adapters add to the vectors of a table (token, type or position embeddings)."""

    def __init__(self, active: ActiveSpans) -> None:
        self.active = active
        self.changes: dict[str, LowRank] = {}

    def add_to(self, x: Tensor, ids: Tensor | None) -> None:
        """Add to x, in place, what the adapters change in the rows `ids` of the table; None stands for row 0.

        x: [total, columns]; ids: [total].
        """
        for name, start, end in self.active.spans:
            change = self.changes.get(name)
            if change is not None:
                up = change.up[0] if ids is None else F.embedding(ids[start:end], change.up)
                x[start:end] += up @ change.down
