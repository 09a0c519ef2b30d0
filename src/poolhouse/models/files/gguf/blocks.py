"""Blocks: the kinds in which GGUF files store numbers, and how each becomes float32 again.

Blocks hold numbers of few bits with a scale or two; K kinds have blocks of 256 with scales of parts within. Source of the
layouts: ggml's ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray[Any, Any]
# Blocks that are made float at once, so that what lies between stays small.
_AT_ONCE = 16384
_NIBBLES = np.array([0, 4], np.uint8)
_PAIRS = np.array([0, 2, 4, 6], np.uint8)
_BITS = np.arange(8, dtype=np.uint8)
# The 16 values of the non-linear kinds.
_NON_LINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of blocks: numbers and bytes of one, and either what torch calls it or how blocks become floats.

    floats: [blocks, bytes] of uint8 -> [blocks, numbers] of float32, or a shape of as many.
    """

    name: str
    numbers: int
    bytes: int
    plain: torch.dtype | None = None
    floats: Callable[[Array], Array] = lambda blocks: blocks

    def read(self, data: Array) -> Tensor:
        """The numbers in these bytes, in one dimension."""
        if self.plain is not None:
            return torch.from_numpy(np.array(data)).view(self.plain)
        blocks = data.reshape(-1, self.bytes)
        result = np.empty((len(blocks), self.numbers), np.float32)
        for begin in range(0, len(blocks), _AT_ONCE):
            part = self.floats(np.ascontiguousarray(blocks[begin : begin + _AT_ONCE]))
            result[begin : begin + _AT_ONCE] = part.reshape(-1, self.numbers)
        return torch.from_numpy(result).flatten()


def _half(blocks: Array, at: int) -> Array:
    """A float16 of each block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """[..., n] -> [..., 2 n]: all low halves of bytes, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: Array, at: int) -> Array:
    """16 for each number whose fifth bit is set, [blocks, 32]; the bits lie in four bytes."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks: Array) -> Array:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Array) -> Array:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: Array) -> Array:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (numbers.astype(np.float32) - 16)


def _q5_1(blocks: Array) -> Array:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)) + _half(blocks, 2)


def _q8_0(blocks: Array) -> Array:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _twos(packed: Array) -> Array:
    """[blocks, 64] -> [blocks, 2, 4, 32]: numbers of two bits; 32 bytes hold four runs of 32."""
    return (packed.reshape(-1, 2, 1, 32) >> _PAIRS[:, None]) & 3


def _in_parts(scales: Array, numbers: Array) -> Array:
    """Numbers times the scale of their part, [blocks, parts] and [blocks, any] -> [blocks, parts, numbers]."""
    return scales[:, :, None] * numbers.reshape(*scales.shape, -1)


def _q2_k(blocks: Array) -> Array:
    scales = blocks[:, :16]
    least: Array = _half(blocks, 82) * (scales >> 4)
    return _in_parts(_half(blocks, 80) * (scales & 15), _twos(blocks[:, 16:80])) - least[:, :, None]


def _q3_k(blocks: Array) -> Array:
    high = (blocks[:, :32].reshape(-1, 1, 32) >> _BITS[:, None]) & 1
    numbers = (_twos(blocks[:, 32:96]).reshape(-1, 8, 32) | (high << 2)).astype(np.float32) - 4
    packed = blocks[:, 96:108]
    # Four bits of the sixteen scales lie in eight bytes, two more of each in the last four.
    upper = ((packed[:, None, 8:] >> _PAIRS[:, None]) & 3).reshape(-1, 16)
    scales = (_nibbles(packed[:, :8]) | (upper << 4)).astype(np.float32) - 32
    return _in_parts(_half(blocks, 108) * scales, numbers)


def _scales_and_least(blocks: Array) -> tuple[Array, Array]:
    """The scales and the least values of eight parts, [blocks, 8] each, of six bits in twelve bytes."""
    first, second, third = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    least = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * least


def _fours(packed: Array) -> Array:
    """[blocks, 128] -> [blocks, 8, 32]: numbers of four bits; 32 bytes hold two runs of 32."""
    return ((packed.reshape(-1, 4, 1, 32) >> _NIBBLES[:, None]) & 15).reshape(-1, 8, 32)


def _q4_k(blocks: Array) -> Array:
    scales, least = _scales_and_least(blocks)
    return _in_parts(scales, _fours(blocks[:, 16:])) - least[:, :, None]


def _q5_k(blocks: Array) -> Array:
    scales, least = _scales_and_least(blocks)
    high = (blocks[:, 16:48].reshape(-1, 1, 32) >> _BITS[:, None]) & 1
    return _in_parts(scales, _fours(blocks[:, 48:]) | (high << 4)) - least[:, :, None]


def _q6_k(blocks: Array) -> Array:
    low = (blocks[:, :128].reshape(-1, 2, 1, 64) >> _NIBBLES[:, None]) & 15
    numbers = low.reshape(-1, 2, 4, 32) | (_twos(blocks[:, 128:192]) << 4)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return _in_parts(scales, numbers.astype(np.float32) - 32)


def _iq4_nl(blocks: Array) -> Array:
    return _half(blocks, 0) * _NON_LINEAR[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: Array) -> Array:
    upper = (np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> (2 * _BITS)) & 3
    lower = ((blocks[:, 4:8, None] >> _NIBBLES) & 15).reshape(-1, 8)
    scales = (lower | (upper << 4)).astype(np.float32) - 32
    return _in_parts(_half(blocks, 0) * scales, _NON_LINEAR[_nibbles(blocks[:, 8:].reshape(-1, 8, 16))])


# By the number that ggml has for each.
KINDS: dict[int, Kind] = {
    0: Kind("F32", 1, 4, torch.float32),
    1: Kind("F16", 1, 2, torch.float16),
    30: Kind("BF16", 1, 2, torch.bfloat16),
    28: Kind("F64", 1, 8, torch.float64),
    8: Kind("Q8_0", 32, 34, floats=_q8_0),
    2: Kind("Q4_0", 32, 18, floats=_q4_0),
    3: Kind("Q4_1", 32, 20, floats=_q4_1),
    6: Kind("Q5_0", 32, 22, floats=_q5_0),
    7: Kind("Q5_1", 32, 24, floats=_q5_1),
    10: Kind("Q2_K", 256, 84, floats=_q2_k),
    11: Kind("Q3_K", 256, 110, floats=_q3_k),
    12: Kind("Q4_K", 256, 144, floats=_q4_k),
    13: Kind("Q5_K", 256, 176, floats=_q5_k),
    14: Kind("Q6_K", 256, 210, floats=_q6_k),
    20: Kind("IQ4_NL", 32, 18, floats=_iq4_nl),
    23: Kind("IQ4_XS", 256, 136, floats=_iq4_xs),
}
# Those that are refused by name.
UNSERVED = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
