"""Disentangled attention against its definition, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from poolhouse.layers.attention import disentangled
from poolhouse.packing.pack import Segments

LENGTHS = (3, 5, 5, 5, 1, 8, 8)
HEADS, HEAD_DIM, SCALE = 2, 4, 0.3


def definition(
    query: Tensor, key: Tensor, value: Tensor, position_key: Tensor | None, position_query: Tensor | None
) -> Tensor:
    """One sequence: every score by itself, in float64. Tables as `attend` takes them."""
    length, out = len(query), torch.zeros_like(query)
    for head in range(HEADS):
        scores = torch.zeros(length, length, dtype=torch.float64)
        for i in range(length):
            for j in range(length):
                score = SCALE * query[i, head].double() @ key[j, head].double()
                if position_key is not None:
                    score += query[i, head].double() @ position_key[max(LENGTHS) - 1 + j - i, head].double()
                if position_query is not None:
                    score += key[j, head].double() @ position_query[max(LENGTHS) - 1 + i - j, head].double()
                scores[i, j] = score
        out[:, head] = (scores.softmax(-1) @ value[:, head].double()).float()
    return out


@pytest.mark.parametrize("scores_per_call", [1, 2 * 2 * 25, 2**22])
@pytest.mark.parametrize("terms", [(True, True), (True, False), (False, True), (False, False)])
def test_every_score_is_that_of_the_definition(
    terms: tuple[bool, bool], scores_per_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(disentangled._SCORES_PER_CALL, "cpu", scores_per_call)
    torch.manual_seed(0)
    # Views into one product, as a model gives them.
    query, key, value = torch.randn(sum(LENGTHS), 3, HEADS, HEAD_DIM).unbind(1)
    tables = [torch.randn(2 * max(LENGTHS) - 1, HEADS, HEAD_DIM) if used else None for used in terms]
    got = disentangled.attend(
        query, key, value, Segments(LENGTHS), scale=SCALE, position_key=tables[0], position_query=tables[1]
    )
    parts = zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS), strict=True)
    expected = torch.cat([definition(q, k, v, *tables) for q, k, v in parts])
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("buckets", "longest"), [(256, 512), (8, 32), (4, 16), (32, 300)])
def test_buckets_are_those_of_transformers(buckets: int, longest: int) -> None:
    # Twice as far as the buckets reach. No tolerance: a rounded logarithm decides where a bucket ends.
    sequence = torch.zeros(1, 2 * longest, 1)
    expected = build_relative_position(sequence, sequence, buckets, longest)[0]
    place = torch.arange(2 * longest)
    assert torch.equal(disentangled.log_bucket(place[:, None] - place[None], buckets, longest), expected)
