"""SPLADE's pooling by hand, and packs that are larger than the logits kept at a time."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from poolhouse.packing.pack import Segments
from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import Rows
from poolhouse.pooling.splade import SpladePooling, VocabularyWeights
from poolhouse.pooling.steps import Dense

# One prompt alone has more rows than a group; others share one.
LENGTHS = (3, 700, 1, 200, 400, 5)


@pytest.mark.parametrize("logarithms", [1, 2])
@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("decoded", [True, False])
def test_weights_are_pooled_logarithms_of_positive_logits(
    decoded: bool, strategy: Literal["max", "sum"], logarithms: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(LENGTHS), 8, generator=generator)
    weight, bias = torch.randn(11, 8, generator=generator), torch.randn(11, generator=generator)
    step = VocabularyWeights(Dense(weight, bias) if decoded else None, SpladePooling(strategy, logarithms))
    got = step(Rows(hidden, Segments(LENGTHS), torch.zeros(len(hidden))), PoolingParams())
    expected = []
    for own in hidden.split(LENGTHS):
        weights = (own @ weight.T + bias if decoded else own).clamp(min=0)
        for _ in range(logarithms):
            weights = (1 + weights).log()
        expected.append(weights.max(0).values if strategy == "max" else weights.sum(0))
    assert torch.allclose(got.values, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert got.segments.lengths == (1,) * len(LENGTHS)
