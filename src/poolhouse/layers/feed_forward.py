"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from poolhouse.layers.linear import Product, fusable


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()


# The activation words of config.json. Words of one line mean the same function.
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

_FUSED_NAMES = {F.gelu: "gelu", _gelu_tanh: "gelu_tanh", F.relu: "relu"}


class FeedForward:
    """down(activation(up(x))), or down(activation(gate) * up) with gate and up in one matrix, gate first."""

    def __init__(self, up: Product, down: Product, activation: str, gated: bool) -> None:
        self.up, self.down, self.gated = up, down, gated
        self.activation = ACTIVATIONS[activation]
        self.fused = _FUSED_NAMES.get(self.activation, "") if not gated else ""
        assert not self.fused or self.fused in fusable

    def inner(self, x: Tensor) -> Tensor:
        """What `down` is applied to: [total, intermediate]."""
        if self.fused:
            return self.up(x, self.fused)
        hidden = self.up(x)
        if not self.gated:
            return self.activation(hidden)
        gate, value = hidden.chunk(2, -1)
        return self.activation(gate).mul_(value)
