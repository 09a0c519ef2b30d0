"""Which rows of a pack an adapter changes."""

from __future__ import annotations

import torch

from poolhouse.layers.adapted import AdaptedLinear, LowRank
from poolhouse.layers.linear import Linear
from poolhouse.packing.pack import Segments


def test_neighbours_with_one_adapter_share_their_rows() -> None:
    segments = Segments([2, 3, 1, 4, 1], adapters=[None, "a", "a", "b", None])
    assert segments.adapter_rows == (("a", 2, 6), ("b", 6, 10))
    assert Segments([2, 3]).adapter_rows == ()


def test_only_rows_of_an_adapter_are_changed() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, up, down, x = (torch.randn(shape, generator=generator) for shape in ((4, 3), (4, 2), (2, 3), (5, 3)))
    layer = AdaptedLinear(Linear(weight))
    layer.changes["a"] = LowRank(up, down)
    segments = Segments([2, 3], adapters=[None, "a"])
    plain, changed = x @ weight.T, x @ (weight + up @ down).T
    expected = torch.cat((plain[:2], changed[2:]))
    torch.testing.assert_close(layer(x, segments=segments), expected)
    torch.testing.assert_close(layer.add_to(torch.ones(5, 4), x, segments), expected + 1)
    # An adapter that does not change this layer, or no word of segments at all.
    torch.testing.assert_close(layer(x, segments=Segments([5], adapters=["b"])), plain)
    torch.testing.assert_close(layer(x), plain)
