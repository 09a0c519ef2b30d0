"""Norms: layer and RMS normalisation of each row."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# The order of casts in RMSNorm, named after who uses it. In bfloat16 a quarter of the results differ.
#   rms        Llama: scale, cast back to the input's type, then multiply by the weight.
#   rms_float  multiply by the weight in float32, then cast back.
#   rms_plus_1 Gemma: the stored weight is an offset from 1; multiplied in float32, then cast back.
NormKind = Literal["layer", "rms", "rms_float", "rms_plus_1"]


class Norm(Protocol):
    """Rows in, normalised rows out."""

    def __call__(self, x: Tensor) -> Tensor: ...


class LayerNorm:
    """weight: [features]; bias: [features] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps
        self.shape = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class RMSNorm:
    """weight: [features]; see NormKind for the order of casts."""

    def __init__(self, weight: Tensor, eps: float, kind: NormKind) -> None:
        # Gemma's offset is applied here once: in float32 nothing is lost by it.
        self.weight = weight.float() + 1 if kind == "rms_plus_1" else weight
        self.eps = eps
        self.kind = kind

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "rms":
            return self.weight * scaled.to(x.dtype)
        return (scaled * self.weight.float()).to(x.dtype)
