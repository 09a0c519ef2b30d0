"""Position biases against transformers and against the paper's words."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import MPNetConfig
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from poolhouse.layers.positions import alibi_bias, alibi_slopes, relative_bias


@pytest.mark.parametrize("length", [1, 2, 40, 300])
def test_relative_bias_equals_mpnets(length: int) -> None:
    torch.manual_seed(8)
    config = MPNetConfig(hidden_size=24, num_attention_heads=3, num_hidden_layers=1, intermediate_size=8)
    encoder = MPNetEncoder(config)
    with torch.inference_mode():
        expected = encoder.compute_position_bias(torch.zeros(1, length, 24))[0]
        table = encoder.relative_attention_bias.weight
        got = relative_bias(table, length)
    assert torch.equal(got, expected)


def test_the_bias_of_a_shorter_sequence_is_the_corner() -> None:
    table = torch.randn(32, 3, generator=torch.Generator().manual_seed(9))
    assert torch.equal(relative_bias(table, 300)[:, :70, :70], relative_bias(table, 70))


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [1 / 256]),
        (2, [1 / 16, 1 / 256]),
        (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        # Heads beyond a power of two take every other slope of twice as many heads.
        (3, [1 / 16, 1 / 256, 1 / 4]),
        (12, [2**-n for n in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_alibi_slopes_are_those_of_the_paper(heads: int, slopes: list[float]) -> None:
    assert alibi_slopes(heads) == pytest.approx(slopes, rel=1e-12)


def test_alibi_slopes_of_sixteen_heads_start_where_the_paper_says() -> None:
    slopes = alibi_slopes(16)
    assert slopes[0] == pytest.approx(2**-0.5)
    assert all(second / first == pytest.approx(2**-0.5) for first, second in itertools.pairwise(slopes))


@pytest.mark.parametrize("heads", [3, 8, 12])
def test_alibi_bias_is_minus_slope_times_distance(heads: int) -> None:
    bias = alibi_bias(heads, 9, torch.device("cpu"))
    assert bias.shape == (heads, 9, 9)
    for head, slope in enumerate(alibi_slopes(heads)):
        for row, column in ((0, 0), (0, 8), (8, 0), (3, 5)):
            assert float(bias[head, row, column]) == pytest.approx(-slope * abs(row - column))
