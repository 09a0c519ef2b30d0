"""Int8 layers against their formula in float64: whole numbers, exact sums, a step per row and per output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse import kernels
from poolhouse.layers import int8
from poolhouse.layers.int8 import Int8Linear, quantised
from poolhouse.layers.linear import fusable
from poolhouse.packing.pack import Segments

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# Sums of whole numbers are exact; behind them are five operations of float32, each 6e-8 off at most, and an activation.
TOLERANCE = 1e-6
needs_kernel = pytest.mark.skipif(int8.compiled_layout() is None, reason="no compiled kernels")
# Who computes: the kernel of this CPU, torch's operators as on a CPU with instructions for int8, and as on one without.
WAYS = [pytest.param("compiled", marks=needs_kernel), "torch", "torch, 127 steps"]


def by_formula(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int = 255) -> Tensor:
    """[rows, out], float64."""
    weight_steps = weight.abs().amax(1) / 127
    whole = torch.round(weight / weight_steps.clamp_min(1e-30)[:, None]).double()
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    factors = 1 / (high - low).clamp_min(1e-30) * levels
    zeros = torch.round(-low * factors)
    rows = torch.minimum(torch.round(x * factors), levels - zeros).double()
    answer = rows @ whole.T * weight_steps.double() * ((high - low).double() / levels)
    return answer if bias is None else answer + bias.double()


def far(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number expected."""
    return float((got - expected).abs().max() / expected.abs().max())


def made(way: str, weight: Tensor, bias: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Int8Linear, int]:
    """The layer, and the steps of its rows."""
    if way != "compiled":
        monkeypatch.setattr(int8, "compiled_layout", lambda: None)
    if way == "torch, 127 steps":
        monkeypatch.setattr(int8, "multiplies_int8", lambda: False)
    elif way == "torch" and not int8.multiplies_int8():
        pytest.skip("this CPU has no instructions for int8")
    return Int8Linear(weight, bias), 127 if way == "torch, 127 steps" else 255


def numbers(rows: int, features: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, residual."""
    random = torch.Generator().manual_seed(rows * features + outputs)
    sizes = ((rows, features), (outputs, features), (outputs,), (rows, outputs))
    x, weight, bias, residual = (torch.randn(*size, generator=random) for size in sizes)
    # Some rows lie on one side of 0, whole or for the most part.
    x = x + torch.randn(rows, 1, generator=random) * 2
    return x * torch.rand(rows, 1, generator=random).exp(), weight, bias, residual


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "features", "outputs"),
    # Ends of blocks, tiles, groups of features and panels of outputs, and what lies beyond each.
    [(1, 4, 64), (2, 5, 1), (6, 48, 65), (7, 33, 17), (13, 384, 40), (96, 16, 16), (97, 70, 130), (200, 31, 96)],
)
def test_a_layer_is_its_formula(
    rows: int, features: int, outputs: int, bias: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, offset, residual = numbers(rows, features, outputs)
    layer, levels = made(way, weight, offset if bias else None, monkeypatch)
    expected = by_formula(x, weight, offset if bias else None, levels)
    for activation in sorted(fusable):
        got = layer(x, activation)
        assert (got.dtype, got.shape) == (torch.float32, (rows, outputs))
        assert far(got, PLAIN[activation](expected)) < TOLERANCE, activation
    before = residual.clone()
    assert far(layer.add_to(residual, x), residual + expected) < TOLERANCE
    assert torch.equal(residual, before)


@pytest.mark.parametrize("way", WAYS)
def test_largest_sums_are_exact(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest numbers on every place: instructions that add pairs in 16 bits would cut them."""
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0]).repeat(1000)
    weight = torch.stack([torch.ones(4000), -torch.ones(4000), signs])
    x = torch.stack([torch.ones(4000), -torch.ones(4000), signs])
    layer, levels = made(way, weight, None, monkeypatch)
    assert far(layer(x), by_formula(x, weight, None, levels)) < TOLERANCE
    torch.testing.assert_close(layer(x[:2]), x[:2] @ weight.T, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_what_it_is_alone(way: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, beside rows of any size, on any number of threads."""
    x, weight, bias, residual = numbers(150, 48, 100)
    x[3], x[4] = 0.0, x[4] * 1e6
    layer, _ = made(way, weight, bias, monkeypatch)
    alone = torch.cat([layer(row[None], "gelu") for row in x])
    added = torch.cat([layer.add_to(before[None], row[None]) for before, row in zip(residual, x, strict=True)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if way == "compiled":
            assert torch.equal(layer(x, "gelu"), alone)
            assert torch.equal(layer.add_to(residual, x), added)
        else:
            # torch's error function has a way of its own for the last few numbers of a row.
            torch.testing.assert_close(layer(x, "gelu"), alone, rtol=1e-6, atol=1e-6)
            assert torch.equal(layer.add_to(residual, x), added)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[3], F.gelu(bias)) or torch.allclose(alone[3], F.gelu(bias), atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_an_output_of_zeros_and_a_tiny_row_have_no_step(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, _ = numbers(3, 40, 20)
    weight[5] = 0.0
    x[0], x[1] = 1e-38, 1e-42
    layer, _ = made(way, weight, bias, monkeypatch)
    got = layer(x)
    assert torch.equal(got[:, 5], bias[5].expand(3))
    assert (got[:2] - bias).abs().max() < 1e-7


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", sorted(fusable))
def test_a_row_that_is_not_finite_answers_so_and_leaves_others_alone(
    activation: str, way: str, broken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias, _ = numbers(9, 37, 70)
    layer, _ = made(way, weight, bias, monkeypatch)
    expected = layer(x, activation)
    for place in (0, 15, 36):
        wrong = x.clone()
        wrong[4, place] = broken
        got = layer(wrong, activation)
        assert got[4].isnan().all()
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        torch.testing.assert_close(got[others], expected[others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_rows_and_residuals_may_be_parts_of_larger_tensors(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, residual = numbers(10, 24, 30)
    layer, _ = made(way, weight, bias, monkeypatch)
    expected, added = layer(x), layer.add_to(residual, x)
    wide, around = torch.randn(20, 50), torch.randn(10, 64)
    wide[::2, 7:31], around[:, 2:32] = x, residual
    assert torch.equal(layer(wide[::2, 7:31]), expected)
    assert torch.equal(layer.add_to(around[:, 2:32], wide[::2, 7:31]), added)
    assert torch.equal(layer(x.T.contiguous().T), expected)
    assert torch.equal(layer.add_to(residual.T.contiguous().T, x), added)
    assert layer(x[:0]).shape == (0, 30)


@needs_kernel
@pytest.mark.parametrize("level", ["avx512_bf16", "avx512", "avx2"])
def test_each_level_of_the_kernel_is_the_formula(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from poolhouse.kernels.build import LEVELS

    if not next(one for one in LEVELS if one.name == level).needs <= kernels.cpu_flags():
        pytest.skip("another CPU")
    caches = (kernels.level, kernels._loaded, int8.compiled_layout, int8._linear)
    monkeypatch.setenv(kernels.VARIABLE, level)
    for cached in caches:
        cached.cache_clear()
    try:
        assert kernels.level() == level
        x, weight, bias, residual = numbers(103, 77, 131)
        layer, expected = Int8Linear(weight, bias), by_formula(x, weight, bias)
        for activation in sorted(fusable):
            assert far(layer(x, activation), PLAIN[activation](expected)) < TOLERANCE
        assert far(layer.add_to(residual, x), residual + expected) < TOLERANCE
    finally:
        monkeypatch.undo()
        for cached in caches:
            cached.cache_clear()


@needs_kernel
def test_what_does_not_fit_is_refused_and_not_read() -> None:
    layer = Int8Linear(torch.ones(6, 8))
    for x in (torch.ones(2, 7), torch.ones(2, 8, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match=r"takes float32 \[rows, 8\]"):
            layer(x)
    for residual in (torch.ones(2, 5), torch.ones(1, 6), torch.ones(2, 6, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"adds float32 \[2, 6\]"):
            layer.add_to(residual, torch.ones(2, 8))
    assert repr(layer) == "Int8Linear(8 -> 6)"


def test_weights_lose_at_most_half_a_step() -> None:
    weight = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 20)[:, None]
    whole, steps = quantised(weight)
    assert whole.dtype == torch.int8
    assert (whole.abs().amax(1) == 127).all()
    assert ((whole * steps[:, None] - weight).abs() <= steps[:, None] * 0.5001).all()


def test_segments_change_nothing() -> None:
    x, weight, bias, residual = numbers(5, 16, 12)
    layer, segments = Int8Linear(weight, bias), Segments([2, 3], adapters=["a", None])
    assert torch.equal(layer(x, segments=segments), layer(x))
    assert torch.equal(layer.add_to(residual, x, segments), layer.add_to(residual, x))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_what_is_gained_is_said(compiled: bool, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "compiled_layout", lambda: int8.Layout(64, 4) if compiled else None)
    monkeypatch.setattr(int8, "multiplies_int8", lambda: quick)
    words = int8.described()
    assert ("torch's operators" in words) == (not compiled)
    assert ("no instructions for int8" in words) == (not quick)
    assert ("what is gained is memory" in words) == (not compiled and not quick)
