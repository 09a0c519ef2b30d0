"""Precision: float32 vectors as smaller numbers, and back; calibrated ranges of int8 and uint8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from poolhouse.errors import ConfigError, InvalidRequest, did_you_mean
from poolhouse.files import save_tensors, whole_file

Precision = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# Integer codes, which are for vectors only; the others are casts of any numbers.
QUANTIZED: tuple[Precision, ...] = ("int8", "uint8", "binary", "ubinary")

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]

# Without calibration: this many steps of int8 per 1/sqrt(width), the root mean square of a unit vector's values.
_STEPS_PER_ROOT_MEAN_SQUARE = 24
# Squared lengths may be off by this much for vectors that were normalised in half precision.
_SQUARE_TOLERANCE = 0.02


def parse_precision(name: str, field: str = "precision") -> Precision:
    """The precision of that name.

    Raises:
        InvalidRequest: there is none; naming `field`.
    """
    if name in PRECISIONS:
        return name
    raise InvalidRequest(
        f"{field}={name!r} is not one of {', '.join(PRECISIONS)}.{did_you_mean(str(name), PRECISIONS)}", field, name
    )


def quantize(
    vectors: Floats, precision: Precision, calibration: Calibration | None = None, *, field: str = "precision"
) -> Codes:
    """Vectors in another precision; each depends on itself and the calibration alone, never on other vectors.

    vectors: [..., width], finite. bfloat16 comes as uint16 and fp8 as uint8 bit patterns. binary and ubinary hold eight
    values per byte, the first in the highest bit, 1 where a value is at least 0; binary is the byte - 128.
    int8 and uint8 saturate; without `calibration` they take vectors of unit length (`Calibration.of_unit_vectors`).

    Raises:
        InvalidRequest: a width or length that the precision cannot take; naming `field`.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    width = vectors.shape[-1]
    if precision in ("int8", "uint8"):
        if calibration is None:
            _check_unit_length(vectors, precision, field)
            calibration = Calibration.of_unit_vectors(width)
        codes = calibration.fitting(width, field).codes(vectors)
        return codes if precision == "uint8" else _signed(codes)
    if precision in ("binary", "ubinary"):
        if width % 8:
            raise InvalidRequest(
                f"{field}={precision!r} needs vectors whose length is a multiple of 8, got {width}.", field, precision
            )
        codes = np.packbits(vectors >= 0, axis=-1)
        return codes if precision == "ubinary" else _signed(codes)
    return _CASTS[precision](vectors)


def dequantize(codes: Codes, precision: Precision, calibration: Calibration | None = None) -> Floats:
    """The float32 vectors that codes of `quantize` stand for, [..., width].

    int8 and uint8 give the middle of each step; binary and ubinary give vectors of unit length, whose values are one number and its negative.
    """
    if precision in ("int8", "uint8"):
        width = codes.shape[-1]
        ranges = Calibration.of_unit_vectors(width) if calibration is None else calibration.fitting(width)
        return ranges.values(codes if precision == "uint8" else _unsigned(codes))
    if precision in ("binary", "ubinary"):
        signs = np.unpackbits(codes if precision == "ubinary" else _unsigned(codes), axis=-1) * np.float32(2) - 1
        return np.asarray(signs / np.sqrt(np.float32(signs.shape[-1])), dtype=np.float32)
    return _VALUES[precision](codes)


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The range of each dimension, which int8 and uint8 divide into 255 steps; what lies outside saturates.

    minimum, maximum: [width] float32. Codes are those of sentence-transformers' `quantize_embeddings(ranges=...)`.

    Raises:
        ConfigError: ranges that are none.
    """

    minimum: Floats
    maximum: Floats

    def __post_init__(self) -> None:
        shapes = (self.minimum.shape, self.maximum.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not shapes[0][0]:
            raise ConfigError(f"A calibration is a minimum and a maximum per dimension, got shapes {list(shapes)}.")
        if {self.minimum.dtype, self.maximum.dtype} != {np.dtype(np.float32)}:
            raise ConfigError(f"A calibration is float32, got {self.minimum.dtype} and {self.maximum.dtype}.")
        if not (np.isfinite(self.minimum).all() and np.isfinite(self.maximum).all()):
            raise ConfigError("A calibration holds NaN or infinity.")
        if (self.minimum > self.maximum).any():
            dimension = int((self.minimum > self.maximum).argmax())
            raise ConfigError(f"The calibrated minimum of dimension {dimension} is larger than its maximum.")

    @property
    def width(self) -> int:
        return len(self.minimum)

    @classmethod
    def of(cls, vectors: Floats) -> Calibration:
        """The ranges that these vectors fill, [count, width] with at least one."""
        if vectors.ndim != 2 or not len(vectors):
            raise ConfigError(f"A calibration is made of a matrix of at least one vector, got shape {vectors.shape}.")
        return cls(vectors.min(axis=0).astype(np.float32), vectors.max(axis=0).astype(np.float32))

    @classmethod
    def of_unit_vectors(cls, width: int) -> Calibration:
        """The ranges for unit vectors without a calibration: int8 is `round(24 * sqrt(width) * value)`.

        So 0 is code 0, products of codes are in proportion to products of values, and values saturate beyond
        5.3 / sqrt(width), which is 5.3 times their root mean square.
        """
        step = 1 / (_STEPS_PER_ROOT_MEAN_SQUARE * np.sqrt(width))
        # Codes are rounded down: half a step lower, they are rounded to the nearest.
        return cls(np.full(width, -128.5 * step, np.float32), np.full(width, 126.5 * step, np.float32))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """The ranges that `save` wrote.

        Raises:
            ConfigError: no such file, or another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                names = sorted(file.keys())
                if names != ["maximum", "minimum"]:
                    raise ConfigError(f"It holds {', '.join(names[:4]) or 'nothing'} instead of minimum and maximum.")
                return cls(file.get_tensor("minimum"), file.get_tensor("maximum"))
        except (OSError, SafetensorError, ConfigError) as error:
            raise ConfigError(f"{path} cannot be read as a calibration: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the ranges as a safetensors file."""
        with whole_file(path) as part:
            save_tensors({"minimum": self.minimum, "maximum": self.maximum}, part)

    def joined(self, other: Calibration) -> Calibration:
        """The ranges that hold those of both."""
        return Calibration(np.minimum(self.minimum, other.minimum), np.maximum(self.maximum, other.maximum))

    def fitting(self, width: int, field: str = "precision") -> Calibration:
        """The ranges of vectors that were cut to this width and normalised again (Matryoshka).

        Normalising lengthens what is left of a vector, so the first ranges are widened: by the root of how many times
        the squares of all ranges' ends exceed those of the first. A calibration of cut vectors is exact.

        Raises:
            InvalidRequest: vectors longer than the calibration; naming `field`.
        """
        if width == self.width:
            return self
        if width > self.width:
            raise InvalidRequest(
                f"The int8 calibration covers {self.width} dimensions, and the vectors have {width}.", field
            )
        squares = np.maximum(np.abs(self.minimum), np.abs(self.maximum)).astype(np.float64) ** 2
        factor = np.float32(np.sqrt(squares.sum() / (squares[:width].sum() or 1)))
        return Calibration(self.minimum[:width] * factor, self.maximum[:width] * factor)

    def codes(self, vectors: Floats) -> npt.NDArray[np.uint8]:
        """Steps from 0 to 255, rounded down, saturated; [..., width]."""
        steps = self._steps()
        with np.errstate(over="ignore"):
            scaled = vectors - self.minimum
            scaled /= np.where(steps == 0, np.float32(1), steps)
        np.floor(scaled, out=scaled)
        return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)

    def values(self, codes: npt.NDArray[np.uint8]) -> Floats:
        """The middle of each step, [..., width]."""
        return np.asarray((codes + np.float32(0.5)) * self._steps() + self.minimum)

    def _steps(self) -> Floats:
        return np.asarray((self.maximum - self.minimum) / np.float32(255))


def _check_unit_length(vectors: Floats, precision: Precision, field: str) -> None:
    """Refuse vectors that are not of unit length, which the fixed range is for; zeros pass."""
    squares = np.einsum("...i,...i->...", vectors, vectors)
    wrong = (np.abs(squares - 1) > _SQUARE_TOLERANCE) & (squares > 0)
    if wrong.any():
        length = float(np.sqrt(squares[wrong].flat[0]))
        raise InvalidRequest(
            f"{field}={precision!r} takes vectors of unit length, and one has length {length:.4g}. Let them be "
            "normalised (use_activation), or store the ranges of this model (`poolhouse calibrate`, "
            "option int8_calibration).",
            field,
            precision,
        )


def _signed(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    return (codes ^ np.uint8(128)).view(np.int8)


def _unsigned(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(codes).view(np.uint8) ^ np.uint8(128)


def _to_float16(vectors: Floats) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return vectors.astype(np.float16)


def _to_bfloat16(vectors: Floats) -> npt.NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest even."""
    bits = vectors.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # The largest NaNs would round over to zero.
    return np.where(np.isnan(vectors), np.uint16(0x7FC0), rounded)


def _from_bfloat16(codes: npt.NDArray[np.uint16]) -> Floats:
    return (codes.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True)
class _Fp8:
    """A format of eight bits (OCP FP8): a sign, an exponent, a mantissa. largest: the code of its largest number."""

    exponent_bits: int
    mantissa_bits: int
    largest: int

    def encode(self, vectors: Floats) -> npt.NDArray[np.uint8]:
        """Rounded to nearest even, saturated at the largest number."""
        bits = vectors.view(np.uint32)
        # The last bit is set where a dropped bit was, so that rounding a second time is correct (round to odd).
        upper = (bits >> 16) | ((bits & 0xFFFF) != 0)
        return np.asarray(np.take(_fp8_codes(self), upper))

    def decode(self, codes: npt.NDArray[np.uint8]) -> Floats:
        return np.take(_fp8_values(self), codes)


@lru_cache
def _fp8_values(form: _Fp8) -> Floats:
    """The number that each code stands for, [256]; NaN beyond the largest, but for infinity in e5m2."""
    codes = np.arange(128)
    exponents, fractions = codes >> form.mantissa_bits, codes & (2**form.mantissa_bits - 1)
    bias = 2 ** (form.exponent_bits - 1) - 1
    mantissas = fractions + 2**form.mantissa_bits * (exponents > 0)
    values = np.ldexp(mantissas.astype(np.float32), np.maximum(exponents, 1) - bias - form.mantissa_bits)
    values[form.largest + 1 :] = np.nan
    if form.exponent_bits == 5:
        values[form.largest + 1] = np.inf
    return np.concatenate([values, -values])


@lru_cache
def _fp8_codes(form: _Fp8) -> npt.NDArray[np.uint8]:
    """The code of each upper half of a float32, [65536]."""
    numbers = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    magnitudes = np.abs(numbers)
    grid = _fp8_values(form)[: form.largest + 1]
    middles = (grid[1:] + grid[:-1]) / 2
    codes = np.searchsorted(middles, magnitudes)
    tied = magnitudes == middles[np.minimum(codes, len(middles) - 1)]
    codes += tied & (codes % 2 == 1)
    codes[np.isnan(numbers)] = 127
    return np.asarray(codes + 128 * np.signbit(numbers), dtype=np.uint8)


_E4M3, _E5M2 = _Fp8(4, 3, 0x7E), _Fp8(5, 2, 0x7B)
_CASTS: Mapping[str, Callable[[Floats], Codes]] = {
    "float32": lambda vectors: vectors,
    "float16": _to_float16,
    "bfloat16": _to_bfloat16,
    "fp8_e4m3": _E4M3.encode,
    "fp8_e5m2": _E5M2.encode,
}
_VALUES: Mapping[str, Callable[[Codes], Floats]] = {
    "float32": lambda codes: codes,
    "float16": lambda codes: codes.astype(np.float32),
    "bfloat16": _from_bfloat16,
    "fp8_e4m3": _E4M3.decode,
    "fp8_e5m2": _E5M2.decode,
}
