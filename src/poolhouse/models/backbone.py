"""Backbone: what turns a pack of token ids into hidden states."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from poolhouse.packing.pack import Batch


class Backbone(Protocol):
    """Token ids in, hidden states out; the native Transformer is one, a model of transformers another.

    reentrant: whether several threads may call it at once.
    """

    reentrant: bool

    def __call__(self, batch: Batch) -> Tensor:
        """[total, hidden] in the backbone's dtype, one row per token of the pack."""
        ...
