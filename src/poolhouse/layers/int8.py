"""Int8: `Linear` with its weight in int8, a step per output, and rows that are brought to int8 as they come, a step each.

    x [rows, in] --row by row: 255 steps from smallest to largest--> whole numbers --exact sums--> * both steps + bias
    weight [out, in] --once: 127 steps to each side of 0, for each output--> whole numbers, laid out for the products

    step = (largest - smallest) / 255, both with 0 among them;  zero = round(-smallest / step)
    y = step * (round(x / step) @ whole) * step of output,  round(x / step) + zero at most 255

Few rows are as large to one side as to the other: a step is half of what it would be with 127 to each side, and texts lose
less than half as much. A row's step depends on that row alone, so what lies beside it in a pack changes nothing. Sums of whole numbers are exact
in any order. The kernels of `poolhouse.kernels` do it in one pass over memory; elsewhere torch's operators do, in several.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse import kernels
from poolhouse.layers.linear import applied, rounded_rows
from poolhouse.packing.pack import Segments

# The smallest number that a row's largest is taken for: a row of zeros has no step.
_LEAST = 1e-30
_LEVELS = 127  # of a weight
# Columns and rows of a weight that `panels` needs whole, as those of `Linear` are.
_PANEL, _GROUPS = 64, 16


class Int8Linear:
    """`x @ weight.T + bias` with the weight in int8.

    weight: [out, in], float32, not kept. bias: [out] or None.
    steps: [out], float32, of a weight that is whole numbers of int8 already: what one step of each output is worth.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, steps: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        whole, steps = quantised(weight.float()) if steps is None else (weight, steps)
        product = _Compiled if compiled_layout() is not None else _ByTorch
        self.product: _Compiled | _ByTorch = product(whole, steps, bias)
        self.dtype = torch.int8
        # Where the laid out weight, its steps, its totals and the bias lie, in whole panels that other kernels read.
        self.panels: tuple[int, int, int, int] | None = None
        if isinstance(self.product, _Compiled) and not self.out_features % _PANEL and not self.in_features % _GROUPS:
            self.panels = self.product.addresses

    def padded_rows(self, count: int) -> int:
        """See `Linear.padded_rows`."""
        return self.product.padded_rows(count)

    def __call__(self, x: Tensor, activation: str = "none", segments: Segments | None = None) -> Tensor:
        """[rows, in] -> [rows, out]; `activation` is one of `fusable`."""
        return self.product(x, activation, None)

    def add_to(self, residual: Tensor, x: Tensor, segments: Segments | None = None) -> Tensor:
        """residual + self(x)."""
        return self.product(x, "none", residual)

    def __repr__(self) -> str:
        return f"Int8Linear({self.in_features} -> {self.out_features})"


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers from -127 to 127, [out, in] int8; what one of their steps is worth, [out])."""
    steps = weight.abs().amax(1) / _LEVELS
    return (weight / steps.clamp_min(_LEAST)[:, None]).round_().to(torch.int8), steps


class Layout(NamedTuple):
    """How a kernel reads a weight: [panels][groups][columns][group]."""

    columns: int
    group: int


@cache
def compiled_layout() -> Layout | None:
    """How the compiled kernel of this CPU reads a weight; None where there is none."""
    ask = kernels.function("int8_layout", kernels.ADDRESS)
    if ask is None:
        return None
    sizes = torch.empty(2, dtype=torch.int64)
    ask(sizes.data_ptr())
    return Layout(*sizes.tolist())


@cache
def _linear() -> Callable[..., None]:
    address, count = kernels.ADDRESS, kernels.COUNT
    found = kernels.function(
        *("int8_linear", address, count, count, count, count, address, address, address, address, count),
        *(address, count, address, count, count),
    )
    assert found is not None
    return found


class _Compiled:
    """Products by the kernel of kernels/int8.cpp."""

    def __init__(self, whole: Tensor, steps: Tensor, bias: Tensor | None) -> None:
        layout = compiled_layout()
        assert layout is not None
        self.out_features, self.in_features = whole.shape
        panels, groups = -(-self.out_features // layout.columns), -(-self.in_features // layout.group)
        outputs = panels * layout.columns
        missing = outputs - self.out_features
        filled = F.pad(whole, (0, groups * layout.group - self.in_features, 0, missing))
        self.packed = filled.view(panels, layout.columns, groups, layout.group).transpose(1, 2).contiguous()
        self.steps = F.pad(steps, (0, missing))
        self.totals = filled.sum(1, dtype=torch.int32)
        self.bias = torch.zeros(outputs) if bias is None else F.pad(bias.float(), (0, missing))
        self.addresses = (
            *(self.packed.data_ptr(), self.steps.data_ptr()),
            *(self.totals.data_ptr(), self.bias.data_ptr()),
        )
        self.run = _linear()

    def padded_rows(self, count: int) -> int:
        return count

    def __call__(self, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
        rows, features = x.shape
        if features != self.in_features or x.dtype != torch.float32:
            raise RuntimeError(
                f"An int8 layer takes float32 [rows, {self.in_features}], not {x.dtype} {list(x.shape)}."
            )
        x = x if x.stride(-1) == 1 else x.contiguous()
        y = torch.empty(rows, self.out_features)
        added, stride = None, 0
        if residual is not None:
            if residual.shape != y.shape or residual.dtype != torch.float32:
                raise RuntimeError(f"An int8 layer adds float32 {list(y.shape)}, not {list(residual.shape)}.")
            residual = residual if residual.stride(-1) == 1 else residual.contiguous()
            added, stride = residual.data_ptr(), residual.stride(0)
        self.run(
            *(
                x.data_ptr(),
                x.stride(0),
                rows,
                features,
                self.out_features,
                *self.addresses,
                kernels.ACTIVATIONS[activation],
            ),
            *(added, stride, y.data_ptr(), self.out_features, torch.get_num_threads()),
        )
        return y


class _ByTorch:
    """Products by oneDNN's operator, whose rows have one step and zero: those of each row are brought in behind it.

    Without instructions for int8 oneDNN adds pairs of products in 16 bits, where two of 255 * 127 do not fit. There rows
    have 127 steps instead of 255.
    """

    def __init__(self, whole: Tensor, steps: Tensor, bias: Tensor | None) -> None:
        self.levels = 255 if multiplies_int8() else 127
        self.weight = torch.ops.onednn.qlinear_prepack(whole.contiguous(), None)
        self.steps = steps
        self.totals = whole.sum(1, dtype=torch.int32) * steps
        self.zeros = torch.zeros(len(whole), dtype=torch.int32)
        self.bias = torch.zeros(len(whole)) if bias is None else bias.float()

    def padded_rows(self, count: int) -> int:
        return rounded_rows(count)

    def __call__(self, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
        smallest, largest = x.amin(1, keepdim=True).clamp_(max=0.0), x.amax(1, keepdim=True).clamp_(min=0.0)
        ranges = largest - smallest
        factors = ranges.clamp_min(_LEAST).reciprocal_().mul_(self.levels)
        zeros = (-smallest * factors).round_()
        codes = (x * factors).round_().add_(zeros).clamp_(max=self.levels).to(torch.uint8)
        rows = len(codes)
        if missing := rounded_rows(rows) - rows:
            codes = F.pad(codes, (0, 0, 0, missing))
        # Counted from the middle, so that sums are small and float32 holds most of them exactly.
        middle = (self.levels + 1) // 2
        y = torch.ops.onednn.qlinear_pointwise.default(
            *(codes, 1.0, middle, self.weight, self.steps, self.zeros, None, 1.0, 0, torch.float32, "none", [], "")
        )
        # NaN where a row is not finite.
        steps = (ranges + ranges * 0.0).div_(self.levels)
        y = torch.addcmul(self.bias, y[:rows].addcmul_(self.totals, middle - zeros), steps)
        return applied(activation, y) if residual is None else y.add_(residual)


def multiplies_int8() -> bool:
    """Whether this CPU has instructions that multiply int8: AVX-512 VNNI or AVX-VNNI; False where nobody says."""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(kernels.cpu_flags())


def possible() -> bool:
    """Whether int8 layers can be made in this process."""
    return compiled_layout() is not None or torch.backends.mkldnn.is_available()


def described() -> str:
    """Who computes int8 layers on this CPU, and what that gains, for people."""
    compiled, quick = compiled_layout() is not None, multiplies_int8()
    who = f"a compiled kernel ({kernels.level()})" if compiled else "torch's operators (there are no compiled kernels)"
    why = "" if quick else f", and this CPU ({platform.machine()}) shows no instructions for int8 (VNNI)"
    gain = {
        (True, True): "three to four times as fast as float32",
        (True, False): "up to twice as fast as float32",
        (False, True): "up to twice as fast as float32 for long packs, and hardly faster for one short text",
        (False, False): "hardly faster than float32: what is gained is memory",
    }
    # The kernel for AVX2 leaves AVX-VNNI unused.
    used = quick and not (compiled and kernels.level() == "avx2")
    return f"Int8 products are computed by {who}{why}: {gain[compiled, used]}."
