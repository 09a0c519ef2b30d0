"""Linear layers; on CPUs the weight is laid out once for the matrix kernels, not at every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Overloads are named below (`.default`, `.binary`): a failed overload match prints its tensors, at 10 ms a call.

# How oneDNN names the activations that it can apply while it writes a product: (operation, algorithm).
_FUSED_ACTIVATIONS = {"none": ("none", ""), "relu": ("relu", "")}
# Without AVX-512 its error function takes four times as long as torch's: 1.5 of 6 ms for 262 x 384 x 1536.
if torch.backends.cpu.get_cpu_capability() == "AVX512":
    _FUSED_ACTIVATIONS |= {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


class Product(Protocol):
    """What blocks need of a linear layer; `Linear` and `AdaptedLinear` are two."""

    out_features: int
    in_features: int

    def padded_rows(self, count: int) -> int: ...

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor: ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor: ...


# Up to so many rows (a short query), MKL's plain product beats oneDNN's on Intel with AVX-512: 50 against 73 us for
# 8 x 384 x 1152. It needs a second copy of the weight, kept for matrices of up to so many entries.
_FEW_ROWS = 24
_SMALL = 3 * 2**20


# Rows are made up to one of so many numbers between two powers of two, no nearer than the least step: for each, and each
# shape of a matrix, oneDNN compiles a kernel in 0.5 ms and keeps its 0.4 MiB.
_SIZES = 4
_LEAST_STEP = 16


class Linear:
    """`x @ weight.T + bias`.

    weight: [out, in]. bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight: Tensor | None = weight
        self.bias = bias
        self.prepacked: Tensor | None = None
        # [in, out], for few rows only.
        self.transposed: Tensor | None = None

    def prepack(self) -> None:
        """Lay the weight out for oneDNN and drop the plain copy; does nothing where that is no gain.

        The plain call repacks the weight each time: up to three times the work for a short query.
        """
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        if weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()):
            self.prepacked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
            self.weight = None
            if weight.dtype == torch.float32 and weight.numel() <= _SMALL and _mkl_is_quicker():
                self.transposed = weight.T.contiguous()

    def padded_rows(self, count: int) -> int:
        """How many rows it computes where it is given so many; giving them at once spares a copy."""
        if self.prepacked is None or (self.transposed is not None and count <= _FEW_ROWS):
            return count
        step = max(_LEAST_STEP, (1 << (count - 1).bit_length()) // (2 * _SIZES))
        return -(-count // step) * step

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
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
        return y if activation == "none" else _ACTIVATIONS[activation](y)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
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


@cache
def _mkl_is_quicker() -> bool:
    """Whether this is a CPU on which MKL beats oneDNN for few rows; on AMD, it does not."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "GenuineIntel" in cpu.read_text(errors="replace")


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# In place.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_.default(x, approximate="tanh"),
    "relu": torch.relu_,
}

fusable = frozenset({"none", *_ACTIVATIONS})
