"""Normalisation of each row."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The order of casts in RMSNorm, named after who uses it. In bfloat16 a quarter of the results differ.
#   rms        Llama: scale, cast back to the input's type, then multiply by the weight.
#   rms_float  multiply by the weight in float32, then cast back.
#   rms_plus_1 Gemma: the stored weight is an offset from 1; multiplied in float32, then cast back.
NormKind = Literal["layer", "rms", "rms_float", "rms_plus_1"]


class LayerNorm(nn.Module):
    """weight: [features]; bias: [features] or None."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """weight: [features]; see NormKind for the order of casts."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float, kind: NormKind) -> None:
        super().__init__()
        # Gemma's offset is applied here once: in float32 nothing is lost by it.
        self.register_buffer("weight", weight.float() + 1 if kind == "rms_plus_1" else weight)
        self.eps = eps
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "rms":
            return self.weight * scaled.to(x.dtype)
        return (scaled * self.weight.float()).to(x.dtype)
