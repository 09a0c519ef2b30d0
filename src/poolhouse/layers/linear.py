"""Linear: `x @ weight.T + bias`, on CPUs with the weight laid out once for the matrix kernels.

torch's own linear layer gets the weight in its plain layout and lays it out for the matrix kernel again at every call.
For a short query that takes up to twice as long as the product itself. `Linear.prepack` does it once:

    weight [out, in] --prepack--+--> prepacked   oneDNN's layout; the plain weight is dropped
                                +--> transposed  [in, out], a second copy for few rows (small weights, Intel, AVX-512)

    call with x [rows, in]
        not prepacked (CUDA, or no gain)    F.linear, then the activation
        transposed, and rows <= _FEW_ROWS   MKL's plain product, then the activation in place
        prepacked                           x padded to `padded_rows`, oneDNN's product; bias, activation or residual
                                            are applied while the result is written

Why pad: oneDNN compiles and keeps a kernel for every number of rows and every shape of a matrix (0.5 ms, 0.4 MiB), and
packs have any number of rows. So only _SIZES numbers between two powers of two are used, at most an eighth (or 15 rows)
more than needed; beyond _MANY_ROWS, where pages of pictures are, multiples of _LARGEST_STEP. A model that pads its hidden states once, to `padded_rows`, spares every layer a copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse import kernels
from poolhouse.packing.pack import Segments

# Operators are called by overload (`.default`, `.binary`): a failed overload match prints its tensors, 10 ms a call.

# oneDNN's names of the activations that it can apply while it writes a product: (operation, algorithm).
_FUSED_ACTIVATIONS = {"none": ("none", ""), "relu": ("relu", "")}
# Without AVX-512 its error function takes four times as long as torch's: 1.5 of 6 ms for 262 x 384 x 1536.
if torch.backends.cpu.get_cpu_capability() == "AVX512":
    _FUSED_ACTIVATIONS |= {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}

# Up to so many rows (a short query), MKL's plain product is faster than oneDNN's on Intel with AVX-512: 50 against 73 us
# for 8 x 384 x 1152. The second copy of the weight is kept for matrices of up to _SMALL entries.
_FEW_ROWS = 24
_SMALL = 3 * 2**20
# Numbers of rows between two powers of two, and the least distance between two of them.
_SIZES = 8
_MIN_STEP = 16
_MANY_ROWS, _LARGEST_STEP = 2048, 128


class Product(Protocol):
    """What blocks need of a linear layer: `Linear`, `Int8Linear` or `AdaptedLinear`.

    segments: whose rows x holds; only layers that treat some rows differently look at it.
    """

    out_features: int
    in_features: int

    def padded_rows(self, count: int) -> int: ...

    def __call__(self, x: Tensor, activation: str = "none", segments: Segments | None = None) -> Tensor: ...

    def add_to(self, residual: Tensor, x: Tensor, segments: Segments | None = None) -> Tensor: ...


class Linear:
    """`x @ weight.T + bias`.

    weight: [out, in]. bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight: Tensor | None = weight
        self.bias = bias
        self.dtype = weight.dtype
        self.prepacked: Tensor | None = None
        # Where `prepacked` lies, in panels that our own kernels read, and of how many columns: see `_panels`. None where it
        # lies otherwise.
        self.panels: tuple[int, int] | None = None
        # [in, out], for few rows only.
        self.transposed: Tensor | None = None

    def prepack(self) -> None:
        """Lay the weight out for oneDNN and drop the plain copy; does nothing where that is no gain."""
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        if weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()):
            self.prepacked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
            self.weight = None
            self.panels = _panels(self.prepacked, weight)
            if weight.dtype == torch.float32 and weight.numel() <= _SMALL and _mkl_is_quicker():
                self.transposed = weight.T.contiguous()

    def padded_rows(self, count: int) -> int:
        """How many rows are computed for `count` rows; a caller that pads to this number spares a copy."""
        if self.prepacked is None or (self.transposed is not None and count <= _FEW_ROWS):
            return count
        return rounded_rows(count)

    def __call__(self, x: Tensor, activation: str = "none", segments: Segments | None = None) -> Tensor:
        """[rows, in] -> [rows, out]; `activation` is one of `fusable`."""
        y: Tensor
        if self.transposed is not None and len(x) <= _FEW_ROWS:
            y = x.mm(self.transposed) if self.bias is None else torch.addmm(self.bias, x, self.transposed)
        elif self.prepacked is not None:
            fused = activation if activation in _FUSED_ACTIVATIONS else "none"
            operation, algorithm = _FUSED_ACTIVATIONS[fused]
            rows = len(x)
            if missing := self.padded_rows(rows) - rows:
                x = F.pad(x, (0, 0, 0, missing))
            y = torch.ops.mkldnn._linear_pointwise.default(x, self.prepacked, self.bias, operation, [], algorithm)
            if missing:
                y = y[:rows]
            if fused == activation:
                return y
        else:
            assert self.weight is not None
            y = F.linear(x, self.weight, self.bias)
        return applied(activation, y)

    def add_to(self, residual: Tensor, x: Tensor, segments: Segments | None = None) -> Tensor:
        """residual + self(x), written in one pass where the kernels can."""
        if self.transposed is not None and len(x) <= _FEW_ROWS:
            if self.bias is None:
                return torch.addmm(residual, x, self.transposed)
            return (residual + self.bias).addmm_(x, self.transposed)
        if self.prepacked is None or self.padded_rows(len(x)) != len(x):
            return residual + self(x)
        return torch.ops.mkldnn._linear_pointwise.binary(  # type: ignore[no-any-return]
            x, residual, self.prepacked, self.bias, "add"
        )

    def __repr__(self) -> str:
        return f"Linear({self.in_features} -> {self.out_features})"


def rounded_rows(count: int) -> int:
    """One of few numbers of rows, not less than `count`; see "Why pad" above."""
    step = max(_MIN_STEP, (1 << (count - 1).bit_length()) // (2 * _SIZES))
    if count > _MANY_ROWS:
        step = _LARGEST_STEP
    return -(-count // step) * step


def applied(activation: str, x: Tensor) -> Tensor:
    """An activation, one of `fusable`, in place."""
    return x if activation == "none" else _ACTIVATIONS[activation](x)


@cache
def _mkl_is_quicker() -> bool:
    """Whether MKL is faster than oneDNN for few rows on this CPU: on Intel with AVX-512; on AMD it is not."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "GenuineIntel" in cpu.read_text(errors="replace")


# By shape and type of a weight: the columns of the panels in which oneDNN lays it out; None: it lies otherwise.
_panel_columns: dict[tuple[int, int, torch.dtype], int | None] = {}


def _panels(prepacked: Tensor, weight: Tensor) -> tuple[int, int] | None:
    """The address of a weight that oneDNN laid out in panels, as it does with AVX-512, and their columns; None where it did not.

    [out / 64, in, 64], in bfloat16 [out / 64, in / 2, 64, 2], and where the CPU has AMX of 32 columns. The first weight of
    a shape is compared, number by number.
    """
    columns, rows = weight.shape
    if columns % 64 or rows % _MIN_STEP or kernels.level() in (None, "avx2"):
        return None
    address = int(torch.ops.mkldnn.data_ptr(prepacked))
    key = (columns, rows, weight.dtype)
    if key not in _panel_columns:
        size = int(torch.ops.mkldnn._nbytes(prepacked))
        laid_out = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=weight.dtype)
        pairs = 4 // weight.element_size()

        def lies_in(panel: int) -> bool:
            expected = weight.view(columns // panel, panel, rows // pairs, pairs).permute(0, 2, 1, 3)
            return size == weight.nbytes and torch.equal(laid_out.view(expected.shape), expected)

        _panel_columns[key] = next(filter(lies_in, (64, 32)), None)
    panel = _panel_columns[key]
    return None if panel is None else (address, panel)


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# In place, for activations that the kernel did not apply.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_.default(x, approximate="tanh"),
    "relu": torch.relu_,
}

fusable = frozenset({"none", *_ACTIVATIONS})
