"""Linear layers; on CPUs the weight is laid out once for the matrix kernels, not at every call."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Overloads are named below (`.default`, `.binary`): a failed overload match prints its tensors, at 10 ms a call.

# How oneDNN names the activations that it can apply while it writes a product: (operation, algorithm).
_FUSED_ACTIVATIONS = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}


class Product(Protocol):
    """What blocks need of a linear layer; `Linear` and `AdaptedLinear` are two."""

    out_features: int
    in_features: int

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor: ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor: ...


class Linear:
    """`x @ weight.T + bias`.

    weight: [out, in]. bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight: Tensor | None = weight
        self.bias = bias
        self.prepacked: Tensor | None = None

    def prepack(self) -> None:
        """Lay the weight out for oneDNN and drop the plain copy; does nothing where that is no gain.

        The plain call repacks the weight each time: three times the work for a short query.
        """
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        if weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()):
            self.prepacked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
            self.weight = None

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """[..., in] -> [..., out]; `activation` is one of `fusable`."""
        if self.prepacked is None:
            assert self.weight is not None
            y = F.linear(x, self.weight, self.bias)
            return y if activation == "none" else _ACTIVATIONS[activation](y)
        operation, algorithm = _FUSED_ACTIVATIONS[activation]
        return torch.ops.mkldnn._linear_pointwise.default(  # type: ignore[no-any-return]
            x, self.prepacked, self.bias, operation, [], algorithm
        )

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x), written in one pass where the kernels can."""
        if self.prepacked is None:
            return residual + self(x)
        return torch.ops.mkldnn._linear_pointwise.binary(  # type: ignore[no-any-return]
            x, residual, self.prepacked, self.bias, "add"
        )

    def __repr__(self) -> str:
        return f"Linear({self.in_features} -> {self.out_features})"


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

fusable = frozenset(_FUSED_ACTIVATIONS)
