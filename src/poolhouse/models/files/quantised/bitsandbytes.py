"""Bitsandbytes: weights of 8 bits with a scale per output, or of 4 bits with one per block of numbers.

    8 bits  weight int8 [out, in], SCB [out]: the largest of each output;  weight = number * SCB / 127
    4 bits  weight: bytes of two numbers, the first in the high half; absmax: the largest of each block;
            quant_map: what the sixteen numbers mean; quant_state: shape and sizes of blocks, JSON in bytes
            nested: absmax is quantised itself, by nested_quant_map and nested_absmax, around nested_offset
Source: bitsandbytes 0.50.2 (functional.py, QuantState).
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.models.files.quantised.stored import Quantised, Settings, Stored, Whole, choice, refuse_unknown, scaled

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_KNOWN = frozenset(
    (
        *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "llm_int8_threshold"),
        *("llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
        *("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
    )
)


def bitsandbytes(settings: Settings) -> Quantised:
    """Weights of bitsandbytes; each says itself how many bits it has."""
    refuse_unknown(settings, _KNOWN)
    four = choice(settings, "load_in_4bit", bool(settings.get("_load_in_4bit")), (False, True))
    what = f"4 bits, {settings.get('bnb_4bit_quant_type', 'fp4')}" if four else "int8"
    return Quantised(
        "bitsandbytes",
        what,
        ("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map", *_STATES, *_NESTED),
        _weight,
        _whole,
        activations=not four,
    )


def _weight(stored: Stored) -> Tensor:
    whole = _whole(stored)
    return _four_bits(stored) if whole is None else scaled(whole[0], whole[1][:, None])


def _whole(stored: Stored) -> Whole | None:
    if stored.parts.isdisjoint(("SCB", "weight_format")):
        return None
    numbers = stored.matrix("weight", torch.int8)
    if "weight_format" in stored.parts and int(stored.get("weight_format")) != 0:
        raise stored.wrong("it is laid out for a GPU (weight_format); save it anew, by rows")
    return numbers, stored.shaped("SCB", len(numbers), dtypes=(torch.float32,)) / 127


def _four_bits(stored: Stored) -> Tensor:
    state = _state(stored)
    shape, block = state["shape"], state["blocksize"]
    count = math.prod(shape)
    octets = stored.get("weight").contiguous().view(torch.uint8).flatten()
    if len(octets) != -(-count // 2):
        raise stored.wrong(f"weight has {len(octets)} bytes, which do not fit {shape} numbers of 4 bits")
    codes = torch.stack((octets >> 4, octets & 15), 1).flatten()
    blocks = -(-count // block)
    codes = F.pad(codes[:count], (0, blocks * block - count))
    meaning = stored.shaped("weight.quant_map", 16, dtypes=(torch.float32,))
    numbers = meaning.index_select(0, codes.to(torch.int32)).view(blocks, block)
    return numbers.mul_(_largest(stored, state, blocks)[:, None]).flatten()[:count].view(shape)


def _largest(stored: Stored, state: dict[str, Any], blocks: int) -> Tensor:
    """[blocks] float32, by which the numbers of each block are multiplied."""
    if "nested_blocksize" not in state:
        return stored.shaped("weight.absmax", blocks, dtypes=(torch.float32,))
    codes, block = stored.shaped("weight.absmax", blocks, dtypes=(torch.uint8,)), state["nested_blocksize"]
    meaning = stored.shaped("weight.nested_quant_map", 256, dtypes=(torch.float32,))
    largest = stored.shaped("weight.nested_absmax", -(-blocks // block), dtypes=(torch.float32,))
    spread = largest.repeat_interleave(block)[:blocks]
    return meaning.index_select(0, codes.to(torch.int32)) * spread + float(state["nested_offset"])


def _state(stored: Stored) -> dict[str, Any]:
    """What `quant_state` says: shape, blocksize, and the same of nested scales."""
    part = next((name for name in _STATES if name in stored.parts), _STATES[0])
    try:
        state = json.loads(bytes(stored.get(part, torch.uint8).tolist()))
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        if len(state["shape"]) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"shape {state['shape']}, blocksize {state['blocksize']}")
        float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise stored.wrong(f"{part} cannot be understood: {error!r}") from error
    return dict(state)
