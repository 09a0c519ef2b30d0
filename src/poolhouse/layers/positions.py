"""Positions: rotary embeddings with their scaled variants, and position biases on attention scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from poolhouse import kernels
from poolhouse.packing.pack import Segments


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How positions rotate pairs of features.

    dim: how many leading features of each head are rotated. theta: base of the wavelengths.
    The other fields belong to one scaling each; lengths are in tokens.
    sections: how many frequencies belong to each axis of positions (time, down, across); () for plain positions.
    interleaved: the axes take turns (Qwen3-VL) instead of lying one after another (Qwen2-VL).
    Source: the `rope_parameters` (older: `rope_scaling`) entry of config.json.
    """

    dim: int
    theta: float = 10000.0
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    sections: tuple[int, ...] = ()
    interleaved: bool = False


def rope_table(rope: RopeSpec, positions: Tensor, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for each position: two [total, 1, dim], each half repeated.

    positions: [total], or [3, total] of three axes, which texts alone have no need of. Dynamic and longrope scalings look at the length of each sequence, never at other sequences.
    """
    if rope.scaling in ("dynamic", "longrope") and segments.longest > rope.original_length:
        by_length = {length: _frequencies(rope, length) for length in set(segments.lengths)}
        scale = by_length[segments.longest][1]
        frequencies = torch.stack([by_length[length][0] for length in segments.lengths]).to(positions.device)
        frequencies = frequencies[segments.owner]
    else:
        frequencies, scale = _frequencies(rope, segments.longest)
    frequencies = frequencies.to(positions.device)
    if positions.ndim == 2:
        axes = torch.tensor(_axes(rope), device=positions.device)
        angles = positions.float()[axes].T * frequencies
    else:
        angles = positions[:, None].float() * frequencies
    angles = torch.cat((angles, angles), -1)[:, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _axes(rope: RopeSpec) -> list[int]:
    """The axis of positions that each frequency turns by: 0 time, 1 down, 2 across."""
    if not rope.interleaved:
        return [axis for axis, count in enumerate(rope.sections) for _ in range(count)]
    axes = [0] * (rope.dim // 2)
    for axis in (1, 2):
        axes[axis : 3 * rope.sections[axis] : 3] = [axis] * len(axes[axis : 3 * rope.sections[axis] : 3])
    return axes


def axial_table(rope: RopeSpec, places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of places in a plane, in float32: two [total, 1, dim], as `rope_table` has those of positions.

    places: [total, 2], row and column; half of the frequencies turn by each.
    """
    frequencies, _ = _frequencies(replace(rope, dim=rope.dim // 2), 0)
    angles = (places[..., None].float() * frequencies.to(places.device)).flatten(1)
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading features of each head, in the type of cos and sin; x: [total, heads, head_dim].

    x is overwritten where a compiled kernel does this in one pass. The answer is the same to the last bit.
    """
    dim = cos.shape[-1]
    if (kernel := _kernel(x, cos, sin)) is not None:
        kernel(
            x.data_ptr(),
            *x.shape[:2],
            *x.stride()[:2],
            cos.data_ptr(),
            sin.data_ptr(),
            dim,
            x.dtype == torch.bfloat16,
            cos.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return x
    rotated = x if x.shape[-1] == dim else x[..., :dim]
    first, second = rotated.chunk(2, -1)
    rotated = (rotated * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return rotated if x.shape[-1] == dim else torch.cat((rotated, x[..., dim:]), -1)


_ARGUMENTS = (kernels.ADDRESS, *[kernels.COUNT] * 4, *[kernels.ADDRESS] * 2, *[kernels.COUNT] * 4)
_TYPES = frozenset({(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)})


def _kernel(x: Tensor, cos: Tensor, sin: Tensor) -> Callable[..., None] | None:
    """What rotates x in place, where it can."""
    plain = x.device.type == "cpu" and x.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous()
    if not plain or len(cos) != len(x) or (x.dtype, cos.dtype) not in _TYPES or torch.is_grad_enabled():
        return None
    return kernels.function("poolhouse_rotate", *_ARGUMENTS)


def relative_bias(table: Tensor, length: int, max_distance: int = 128) -> Tensor:
    """T5's bucketed bias: [heads, length, length] from a table [buckets, heads].

    The bias of a shorter sequence is the top left corner. Source: Raffel et al. 2020; MPNet uses the same buckets.
    """
    index = torch.arange(length, device=table.device)
    buckets = _buckets(index[None] - index[:, None], table.shape[0], max_distance)
    return table[buckets].permute(2, 0, 1)


def alibi_bias(heads: int, length: int, device: torch.device) -> Tensor:
    """Symmetric ALiBi: [heads, length, length], minus slope times distance. Source: Press et al. 2022."""
    index = torch.arange(length, device=device)
    distance = (index[None] - index[:, None]).abs()
    return -distance * torch.tensor(alibi_slopes(heads), device=device)[:, None, None]


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head; a number of heads that is no power of two takes slopes of the next power."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


def _frequencies(rope: RopeSpec, length: int) -> tuple[Tensor, float]:
    """Angle per token of each feature pair, [dim / 2], and a factor on cosines and sines; length: of the sequence."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    plain = 1.0 / rope.theta**exponents
    if rope.scaling == "default":
        return plain, 1.0
    if rope.scaling == "linear":
        return plain / rope.factor, 1.0
    if rope.scaling == "dynamic":
        length = max(length, rope.original_length)
        stretch = rope.factor * length / rope.original_length - (rope.factor - 1)
        theta: float = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
        return 1.0 / theta**exponents, 1.0
    if rope.scaling == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.scaling == "yarn":
        return _yarn(rope, plain)
    return _longrope(rope, exponents, length)


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / plain
    low = rope.original_length / rope.low_frequency_factor
    high = rope.original_length / rope.high_frequency_factor
    smooth = (rope.original_length / wavelengths - rope.low_frequency_factor) / (
        rope.high_frequency_factor - rope.low_frequency_factor
    )
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    slow = torch.where(wavelengths > low, plain / rope.factor, blended)
    return torch.where(wavelengths < high, plain, slow)


def _yarn(rope: RopeSpec, plain: Tensor) -> tuple[Tensor, float]:
    def mscale(factor: float, weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def pair_of(turns: float) -> float:
        """The feature pair that makes so many full turns over the original length."""
        return rope.dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    if scale is None:
        scale = mscale(rope.factor)
    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high > low else 0.001
    ramp = ((torch.arange(rope.dim // 2).float() - low) / width).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp), scale


def _longrope(rope: RopeSpec, exponents: Tensor, length: int) -> tuple[Tensor, float]:
    stretched = length > rope.original_length
    factors = torch.tensor(rope.long_factor if stretched else rope.short_factor)
    scale = rope.attention_factor
    if scale is None:
        factor = rope.factor
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original_length))
    return 1.0 / (factors * rope.theta**exponents), scale


def _buckets(relative: Tensor, buckets: int, max_distance: int) -> Tensor:
    half = buckets // 2
    exact = half // 2
    ahead = (relative > 0).long() * half
    distance = relative.abs()
    grown = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + grown.long()).clamp(max=half - 1)
    return ahead + torch.where(distance < exact, distance, far)
