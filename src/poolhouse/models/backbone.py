"""Backbone: what turns a pack of token ids into hidden states, and Tower, which makes rows of the pack's pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from poolhouse.packing.pack import Batch, PackedPictures


class Backbone(Protocol):
    """Token ids in, hidden states out; the native Transformer is one, a model of transformers another.

    reentrant: whether several threads may call it at once. longest_shared: tokens of the longest prompt whose beginning
    may run once for all prompts that begin so (`poolhouse.packing.prefixes`); 0 where each must lie in a pack whole.
    picks: whether it answers with the rows of `Batch.read` alone, where a batch names some.
    """

    reentrant: bool
    longest_shared: int
    picks: bool

    def __call__(self, batch: Batch) -> Tensor:
        """[total, hidden] in the backbone's dtype, one row per token of the pack, or one per row that is read."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PictureRows:
    """What a tower gives of the pictures of a pack, in their order.

    rows: [rows, width of the text model], which take the places of placeholders.
    deep: [rows, width] each; the k-th is added to the same places behind layer k of the text model (deepstack).
    """

    rows: Tensor
    deep: tuple[Tensor, ...] = ()


class Tower(Protocol):
    """Pictures in, rows out; each picture is a segment of the tower's own pack, so none sees another."""

    def __call__(self, pictures: PackedPictures) -> PictureRows: ...
