"""Feed-forward layers of a block, plain, gated and as a mixture of experts, and their activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse import kernels
from poolhouse.layers.linear import Product, fusable
from poolhouse.packing.pack import Segments


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return (1.702 * x).sigmoid_().mul_(x)


# The activation names of config.json. Names on one line mean the same function.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_tanh", "gelu_fast", "gelu_accurate"), _gelu_tanh),
    **dict.fromkeys(("silu", "swish"), F.silu),
    "relu": F.relu,
    "relu2": _relu_squared,
    "quick_gelu": _quick_gelu,
    "tanh": F.tanh,
    "mish": F.mish,
    **dict.fromkeys(("linear", "identity"), lambda x: x),
}

_ARGUMENTS = (kernels.ADDRESS, *[kernels.COUNT] * 2, kernels.ADDRESS, *[kernels.COUNT] * 3)


def _gated(hidden: Tensor) -> Callable[..., None] | None:
    """What multiplies activated gates with values in one pass, where it can."""
    possible = hidden.device.type == "cpu" and hidden.dtype in (torch.float32, torch.bfloat16)
    if not possible or hidden.ndim != 2 or not hidden.is_contiguous() or torch.is_grad_enabled():
        return None
    return kernels.function("poolhouse_gated", *_ARGUMENTS)


# The short names of activations that kernels know; those that a plain product can apply are in `fusable`.
_NAMES = {F.gelu: "gelu", _gelu_tanh: "gelu_tanh", F.relu: "relu", F.silu: "silu"}


class FeedForward:
    """down(activation(up(x))), or down(activation(gate) * up) with gate and up in one matrix, gate first."""

    def __init__(self, up: Product, down: Product, activation: str, gated: bool) -> None:
        self.up, self.down, self.gated = up, down, gated
        self.activation = ACTIVATIONS[activation]
        # "other" is one that no kernel knows.
        self.name = _NAMES.get(self.activation, "other")
        self.fused = self.name if not gated and self.name in fusable else ""

    def __call__(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """[total, hidden] -> [total, hidden]. segments: see `Product`."""
        return self.down(self._inner(x, segments), segments=segments)

    def add_to(self, residual: Tensor, x: Tensor, segments: Segments | None = None) -> Tensor:
        """residual + self(x)."""
        return self.down.add_to(residual, self._inner(x, segments), segments)

    def _inner(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """The input of `down`: [total, intermediate]."""
        if self.fused:
            return self.up(x, self.fused, segments)
        hidden = self.up(x, segments=segments)
        if not self.gated:
            return self.activation(hidden)
        number = kernels.ACTIVATIONS.get(self.name)
        if number is not None and (kernel := _gated(hidden)) is not None:
            rows, width = len(hidden), hidden.shape[1] // 2
            out = hidden.new_empty(rows, width)
            half = hidden.dtype == torch.bfloat16
            kernel(hidden.data_ptr(), rows, width, out.data_ptr(), number, half, torch.get_num_threads())
            return out
        gate, value = hidden.chunk(2, -1)
        return self.activation(gate).mul_(value)


class Experts:
    """A mixture of experts: a router chooses `chosen` feed-forwards for each token; their weighted sum is shifted by bias.

    The weights are the router's softmax over all experts, not normalised again. bias: [hidden] or None.
    Source: Nussbaum and Duderstadt 2025 (nomic-embed-text-v2-moe).
    """

    def __init__(self, router: Product, experts: list[FeedForward], bias: Tensor | None, chosen: int) -> None:
        self.router, self.experts, self.bias, self.chosen = router, experts, bias, chosen

    def __call__(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """[total, hidden] -> [total, hidden]; each expert runs once, on all tokens that chose it."""
        weights, chosen = self.router(x).softmax(-1, dtype=torch.float32).topk(self.chosen)
        by_expert = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = x[by_expert // self.chosen].split(counts)
        answers = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        by_token = torch.empty_like(answers).index_copy_(0, by_expert, answers).view(len(x), self.chosen, -1)
        mixed = (by_token * weights.to(x.dtype)[..., None]).sum(1)
        return mixed if self.bias is None else mixed + self.bias

    def add_to(self, residual: Tensor, x: Tensor, segments: Segments | None = None) -> Tensor:
        """residual + self(x)."""
        return residual + self(x)
