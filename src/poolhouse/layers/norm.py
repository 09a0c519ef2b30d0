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
    *[kernels.ADDRESS] * 2,
    kernels.REAL,
    kernels.COUNT,
    kernels.ADDRESS,
    *[kernels.COUNT] * 2,
)
_LAYER_ARGUMENTS = (
    *(kernels.ADDRESS, *[kernels.COUNT] * 3, *[kernels.ADDRESS] * 2, kernels.REAL),
    *(kernels.ADDRESS, kernels.COUNT),
)
_SQUARES_ARGUMENTS = (kernels.ADDRESS, *[kernels.COUNT] * 5, kernels.ADDRESS, kernels.COUNT)


class Norm(Protocol):
    """Rows in, normalised rows out."""

    def __call__(self, x: Tensor) -> Tensor: ...


class LayerNorm:
    """weight: [features]; bias: [features] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight.contiguous(), None if bias is None else bias.contiguous(), eps
        self.shape = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        if (kernel := self._kernel(x)) is not None:
            out, bias = x.new_empty(x.shape), None if self.bias is None else self.bias.data_ptr()
            given = (x.data_ptr(), x.shape[0], x.stride(0), x.shape[1], self.weight.data_ptr(), bias, self.eps)
            kernel(*given, out.data_ptr(), torch.get_num_threads())
            return out
        return torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def _kernel(self, x: Tensor) -> Callable[..., None] | None:
        """What norms x in one pass, where it can: with the very operations of the kernel that runs short packs."""
        possible = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu" and x.ndim == 2
        if not possible or x.shape[1:] != self.shape or x.shape[1] % 16 or x.stride(1) != 1 or torch.is_grad_enabled():
            return None
        return kernels.function("poolhouse_layer_norm", *_LAYER_ARGUMENTS)


class RMSNorm:
    """weight: [features]; see NormKind for the order of casts."""

    def __init__(self, weight: Tensor, eps: float, kind: NormKind) -> None:
        # Gemma's offset is applied here once: in float32 nothing is lost by it.
        self.weight = weight.float() + 1 if kind == "rms_plus_1" else weight
        self.eps = eps
        self.kind = kind
        self._wide = self.weight.float().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if (found := self._kernels(x)) is not None:
            return self._compiled(x, *found)
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "rms":
            return self.weight * scaled.to(x.dtype)
        return (scaled * self.weight.float()).to(x.dtype)

    def _kernels(self, x: Tensor) -> tuple[Callable[..., None], Callable[..., None]] | None:
        """What norms x in one pass, and what squares it, where they can."""
        possible = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.ndim in (2, 3)
        if not possible or x.shape[-1] % 16 or x.stride(-1) != 1 or torch.is_grad_enabled():
            return None
        norm = kernels.function("poolhouse_rms_norm", *_ARGUMENTS)
        squares = kernels.function("poolhouse_squares", *_SQUARES_ARGUMENTS)
        return None if norm is None or squares is None else (norm, squares)

    def _compiled(self, x: Tensor, norm: Callable[..., None], squares: Callable[..., None]) -> Tensor:
        heads, head_step = (1, 0) if x.ndim == 2 else (x.shape[1], x.stride(1))
        given = (x.data_ptr(), x.shape[0], heads, x.stride(0), head_step, x.shape[-1])
        out, threads, factors = x.new_empty(x.shape), torch.get_num_threads(), None
        half = x.dtype == torch.bfloat16
        if half:
            # torch sums: in another order, five of a million numbers would differ by a rounding.
            squared = torch.empty(x.shape, dtype=torch.float32)
            squares(*given, squared.data_ptr(), threads)
            factors = torch.rsqrt(squared.mean(-1) + self.eps)
        address = 0 if factors is None else factors.data_ptr()
        norm(*given, self._wide.data_ptr(), address, self.eps, self.kind == "rms", out.data_ptr(), half, threads)
        return out
