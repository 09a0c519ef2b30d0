"""Prepacked linear layers against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from poolhouse.layers.linear import Linear, fusable

PLAIN = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# Sums of 48 products of numbers near 1; bfloat16 keeps 8 bits of a result near 20.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.13}
bfloat16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU multiplies no bfloat16"
    ),
)


def made(dtype: torch.dtype, bias: bool, prepacked: bool) -> tuple[Linear, torch.Tensor, torch.Tensor | None]:
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 48, generator=random).to(dtype)
    offset = torch.randn(24, generator=random).to(dtype) if bias else None
    linear = Linear(weight, offset)
    if prepacked:
        linear.prepack()
        assert linear.prepacked is not None
        assert linear.weight is None
    return linear, weight, offset


@pytest.mark.parametrize("activation", sorted(fusable))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_linear_equals_torch(rows: int, dtype: torch.dtype, prepacked: bool, bias: bool, activation: str) -> None:
    linear, weight, offset = made(dtype, bias, prepacked)
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = linear(x, activation)
    expected = PLAIN[activation](F.linear(x.double(), weight.double(), None if offset is None else offset.double()))
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, bfloat16])
def test_add_to_adds_and_leaves_the_residual_as_it_was(dtype: torch.dtype, prepacked: bool, bias: bool) -> None:
    linear, weight, offset = made(dtype, bias, prepacked)
    random = torch.Generator().manual_seed(4)
    x, residual = torch.randn(9, 48, generator=random).to(dtype), torch.randn(9, 24, generator=random).to(dtype)
    before = residual.clone()
    got = linear.add_to(residual, x)
    expected = residual.double() + F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert (got.double() - expected).abs().max() < TOLERANCE[dtype]
    assert torch.equal(residual, before)


def test_half_precision_without_kernels_stays_plain() -> None:
    linear = Linear(torch.ones(3, 4, dtype=torch.float16))
    linear.prepack()
    assert linear.prepacked is None
    assert linear(torch.ones(2, 4, dtype=torch.float16)).tolist() == [[4.0] * 3] * 2
    assert repr(linear) == "Linear(4 -> 3)"


@pytest.mark.parametrize("few", [False, True], ids=["oneDNN alone", "MKL for few rows"])
def test_products_come_in_few_sizes(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a kernel for each."""
    monkeypatch.setattr("poolhouse.layers.linear._mkl_is_quicker", lambda: few)
    linear, *_ = made(torch.float32, bias=True, prepacked=True)
    assert (linear.transposed is not None) == few
    sizes = {count: linear.padded_rows(count) for count in range(25, 2049)}
    assert len(set(sizes.values())) <= 40
    for count, rows in sizes.items():
        # An eighth more at most, but for the least step.
        assert count <= rows <= max(count * 9 / 8, count + 15)
        assert linear.padded_rows(rows) == rows
    assert [linear.padded_rows(count) for count in (2049, 2052, 4097, 5040)] == [2176, 2176, 4224, 5120]


def test_a_plain_weight_takes_rows_as_they_are() -> None:
    linear, *_ = made(torch.float32, bias=True, prepacked=False)
    assert [linear.padded_rows(count) for count in (1, 30, 1001)] == [1, 30, 1001]
