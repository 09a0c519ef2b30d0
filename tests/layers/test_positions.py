"""Position biases against transformers and against the paper's words."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from transformers import MPNetConfig
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from poolhouse import kernels
from poolhouse.kernels.build import LEVELS
from poolhouse.layers.positions import alibi_bias, alibi_slopes, relative_bias, rotate


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


@pytest.mark.parametrize("level", ["0", *(one.name for one in LEVELS)])
@pytest.mark.parametrize(
    ("dtype", "of_table"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize(("width", "dim"), [(64, 64), (80, 80), (12, 12), (64, 20), (2, 2)])
def test_rotation_is_rounded_as_torch_rounds_it(
    width: int,
    dim: int,
    dtype: torch.dtype,
    of_table: torch.dtype,
    level: str,
    at_level: Callable[[str], None],
) -> None:
    at_level(level)
    random = torch.Generator().manual_seed(4)
    # A view of a wider product, as queries are.
    product = torch.randn(37, 5 * width, generator=random).to(dtype)
    product[3, 1], product[5, width] = torch.nan, torch.inf
    product[6, : 5 * width] = 0.0
    angles = 100 * torch.randn(37, 1, dim // 2, generator=random)
    angles = torch.cat((angles, angles), -1)
    cos, sin = angles.cos().to(of_table), angles.sin().to(of_table)
    before = product.clone()
    heads = before[:, : 3 * width].view(37, 3, width)
    first, second, rest = heads.split([dim // 2, dim // 2, width - dim], -1)
    turned = heads[..., :dim] * cos + torch.cat((-second, first), -1) * sin
    expected = torch.cat((turned.to(dtype), rest), -1)
    with torch.inference_mode():
        got = rotate(product[:, : 3 * width].view(37, 3, width), cos, sin)
    assert got.dtype == dtype
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    # Nothing beside it was touched.
    assert torch.equal(product[:, 3 * width :], before[:, 3 * width :])


@pytest.mark.skipif(kernels.level() is None, reason="no compiled kernels")
def test_rotation_on_several_cores_is_that_on_one() -> None:
    x = torch.randn(700, 12, 64, generator=torch.Generator().manual_seed(4))
    cos, sin = torch.rand(700, 1, 64), torch.rand(700, 1, 64)
    before = torch.get_num_threads()
    with torch.inference_mode():
        alone = rotate(x.clone(), cos, sin)
        torch.set_num_threads(3)
        try:
            got = rotate(x.clone(), cos, sin)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(got, alone)
