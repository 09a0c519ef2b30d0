"""Fp8: weights in float8 with a scale per block of 128 x 128 numbers (DeepSeek, Qwen), per output or for all.

    weight float8_e4m3fn [out, in]; weight_scale_inv [out / 128, in / 128] or weight_scale [1], [out, 1]
    weight = number * scale, in spite of the name
Sources: transformers 5.23 (integrations/finegrained_fp8.py), vLLM's method "fp8".
"""

from __future__ import annotations

import torch
from torch import Tensor

from poolhouse.models.files.quantised.stored import (
    SCALES,
    Quantised,
    Settings,
    Stored,
    blocks_of,
    choice,
    pair,
    refuse_unknown,
    scaled_by_block,
)

_KNOWN = frozenset(
    (
        *("quant_method", "activation_scheme", "weight_block_size", "modules_to_not_convert", "modules_to_convert"),
        *("ignored_layers", "fmt", "scale_fmt", "dequantize", "expert_dtype"),
    )
)
_UNUSED = ("input_scale", "k_scale", "v_scale")


def fp8(settings: Settings) -> Quantised:
    """Weights in float8."""
    refuse_unknown(settings, _KNOWN)
    choice(settings, "fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
    choice(settings, "scale_fmt", "float", ("float", "ue8m0"))
    choice(settings, "expert_dtype", "fp8", ("fp8",))
    block = None if settings.get("weight_block_size") is None else pair(settings, "weight_block_size")

    def weight(stored: Stored) -> Tensor:
        numbers = stored.matrix("weight", torch.float8_e4m3fn)
        if "weight_scale_inv" in stored.parts or block is not None:
            return _by_block(stored, numbers, block or (128, 128))
        scale = stored.get("weight_scale", *SCALES)
        if scale.numel() not in (1, len(numbers)):
            raise stored.wrong(f"weight_scale is {list(scale.shape)}, neither one number nor {len(numbers)}")
        return numbers.to(torch.float32).mul_(scale.to(torch.float32).view(-1, 1))

    what = "fp8" if block is None else f"fp8 in blocks of {block[0]} x {block[1]}"
    return Quantised(
        "fp8", what, ("weight", "weight_scale", "weight_scale_inv"), weight, unused=_UNUSED, activations=True
    )


def _by_block(stored: Stored, numbers: Tensor, block: tuple[int, int]) -> Tensor:
    dtypes = (*SCALES, torch.float8_e8m0fnu)
    scales = stored.shaped("weight_scale_inv", *blocks_of(numbers.shape, block), dtypes=dtypes)
    return scaled_by_block(numbers, scales, block)
