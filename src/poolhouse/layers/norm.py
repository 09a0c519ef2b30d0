"""Norms: layer and RMS normalisation of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse import kernels

# The order of casts in RMSNorm, named after who uses it. In bfloat16 a quarter of the results differ.
#   rms        Llama: scale, cast back to the input's type, then multiply by the weight.
#   rms_float  multiply by the weight in float32, then cast back.
#   rms_plus_1 Gemma: the stored weight is an offset from 1; multiplied in float32, then cast back.
NormKind = Literal["layer", "rms", "rms_float", "rms_plus_1"]


_ARGUMENTS = (
    kernels.ADDRESS,
    *[kernels.COUNT] * 5,
    kernels.ADDRESS,
    kernels.REAL,
    kernels.COUNT,
    kernels.ADDRESS,
    *[kernels.COUNT] * 2,
)


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
        self._wide = self.weight.float().contiguous()

    def _kernel(self, x: Tensor) -> Callable[..., None] | None:
        """What norms x in one pass, where it can."""
        possible = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.ndim in (2, 3)
        if not possible or x.shape[-1] % 16 or x.stride(-1) != 1 or torch.is_grad_enabled():
            return None
        return kernels.function("poolhouse_rms_norm", *_ARGUMENTS)

    def __call__(self, x: Tensor) -> Tensor:
        if (kernel := self._kernel(x)) is not None:
            rows, heads = x.shape[0], 1 if x.ndim == 2 else x.shape[1]
            out = x.new_empty(x.shape)
            wide, threads = self._wide, torch.get_num_threads()
            steps = (x.stride(0), 0 if x.ndim == 2 else x.stride(1))
            shape = (rows, heads, *steps, x.shape[-1])
            rounded, half = self.kind == "rms", x.dtype == torch.bfloat16
            kernel(x.data_ptr(), *shape, wide.data_ptr(), self.eps, rounded, out.data_ptr(), half, threads)
            return out
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "rms":
            return self.weight * scaled.to(x.dtype)
        return (scaled * self.weight.float()).to(x.dtype)
