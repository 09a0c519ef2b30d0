"""The compiled attention at every level of instructions against the definition, and what it leaves to others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poolhouse import kernels
from poolhouse.kernels.build import LEVELS
from poolhouse.layers.attention import attend, compiled, reference, sdpa
from poolhouse.packing.pack import NO_PREFIX, Prefix, Segments

pytestmark = pytest.mark.skipif(kernels.level() is None, reason="no compiled kernels")

AtLevel = Callable[[str], None]

levels = pytest.mark.parametrize("level", [one.name for one in LEVELS])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

# Around the widths of registers, of blocks of rows (24, 30, 32) and of keys (256), and of pieces of work (240, 256).
SHORT = (1, 2, 7, 8, 9, 15, 16, 17, 23, 31, 33, 41, 64)
LONG = (255, 1, 257, 513, 700)


def fused(
    lengths: tuple[int, ...], heads: int, kv_heads: int, width: int, dtype: torch.dtype, more: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as parts of one product, with rows of padding behind."""
    random = torch.Generator().manual_seed(7)
    rows = sum(lengths) + more
    product = torch.randn(rows, (heads + 2 * kv_heads) * width, generator=random).to(dtype)
    q, k, v = product.split([heads * width, kv_heads * width, kv_heads * width], -1)
    return q.view(rows, heads, width), k.view(rows, kv_heads, width), v.view(rows, kv_heads, width)


def tolerance(query: Tensor, key: Tensor, value: Tensor, scale: float) -> float:
    """What rounding may move an answer by, which is a mean of values."""
    largest = float(value.abs().max())
    if value.dtype == torch.bfloat16:
        # Weights and answer are rounded, each by half of 2^-8 of itself.
        return largest * 2**-8
    # A score is off by its sum's rounding, and its weight by that share.
    longest = float(query.norm(dim=-1).max() * key.norm(dim=-1).max()) * scale
    return largest * 2**-23 * (8 + longest)


def check(tensors: tuple[Tensor, Tensor, Tensor], segments: Segments, **options: Any) -> Tensor:
    """The kernel's answer, which is near the definition's."""
    scale = tensors[0].shape[-1] ** -0.5
    got = compiled.attend(*tensors, segments, scale=scale, **options)
    rows = segments.total
    expected = reference.attend(*(x[:rows].double() for x in tensors), segments, scale=scale, **options)
    assert got.dtype == tensors[0].dtype
    assert (got[:rows].double() - expected).abs().max() <= tolerance(*tensors, scale)
    assert not got[rows:].any()
    return got


@levels
@dtypes
@pytest.mark.parametrize("lengths", [SHORT, LONG])
@pytest.mark.parametrize("attended", [False, True])
@pytest.mark.parametrize("window", [None, 0, 3, 40, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_it_equals_the_definition(
    causal: bool,
    window: int | None,
    attended: bool,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    level: str,
    at_level: AtLevel,
) -> None:
    at_level(level)
    counts = [1 + length * 2 // 3 for length in lengths] if attended else None
    tensors = fused(lengths, 2, 1, 32, dtype, more=3)
    check(tensors, Segments(lengths, attended=counts), causal=causal, window=window)


@levels
@dtypes
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("width", [8, 16, 24, 40, 64, 72, 80, 128, 256])
def test_heads_of_any_size_and_number_equal_the_definition(
    width: int, heads: int, kv_heads: int, dtype: torch.dtype, level: str, at_level: AtLevel
) -> None:
    at_level(level)
    lengths = (5, 33, 70)
    tensors = fused(lengths, heads, kv_heads, width, dtype)
    assert compiled.can_run(tensors[0], tensors[1], 0.5, None)
    for options in ({"causal": False, "window": 9}, {"causal": True, "window": None}):
        check(tensors, Segments(lengths), **options)


@levels
@dtypes
@pytest.mark.parametrize("attended", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 40)])
def test_a_bias_is_added_to_the_scaled_scores(
    causal: bool, window: int | None, attended: bool, dtype: torch.dtype, level: str, at_level: AtLevel
) -> None:
    at_level(level)
    lengths = (5, 33, 300, 1)
    tensors = fused(lengths, 4, 2, 24, dtype)
    bias = torch.randn(4, 300, 300, generator=torch.Generator().manual_seed(1)) * 3
    counts = [1 + length * 2 // 3 for length in lengths] if attended else None
    segments = Segments(lengths, attended=counts)
    got = check(tensors, segments, causal=causal, window=window, bias=bias)
    assert not torch.allclose(got, check(tensors, segments, causal=causal, window=window), atol=0.1)


@dtypes
@pytest.mark.parametrize("layout", ["rows", "heads first", "features first", "every second row"])
def test_any_layout_of_memory_gives_the_same(layout: str, dtype: torch.dtype) -> None:
    lengths = (9, 40)
    tensors = fused(lengths, 4, 2, 16, dtype)
    segments = Segments(lengths)
    expected = check(tensors, segments, causal=False, window=None)

    def laid(x: Tensor) -> Tensor:
        if layout == "rows":
            return x.contiguous()
        if layout == "heads first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "features first":
            return x.transpose(0, 2).contiguous().transpose(0, 2)
        return torch.stack((x, torch.full_like(x, torch.nan)), 1)[:, 0]

    moved = [laid(x) for x in tensors]
    got = compiled.attend(*moved, segments, scale=16**-0.5, causal=False, window=None)  # type: ignore[misc]
    assert torch.equal(got, expected)


@levels
@dtypes
@pytest.mark.parametrize("causal", [False, True])
def test_a_pack_equals_each_sequence_alone_to_the_last_bit(
    causal: bool, dtype: torch.dtype, level: str, at_level: AtLevel
) -> None:
    at_level(level)
    lengths = (*SHORT, *LONG)
    tensors = fused(lengths, 2, 1, 16, dtype)
    segments = Segments(lengths)
    packed = compiled.attend(*tensors, segments, scale=0.2, causal=causal, window=50)
    for start, end in zip(segments.starts, segments.ends, strict=True):
        parts = [x[start:end] for x in tensors]
        alone = compiled.attend(*parts, Segments((end - start,)), scale=0.2, causal=causal, window=50)  # type: ignore[misc]
        assert torch.equal(packed[start:end], alone)


@levels
@dtypes
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_finite_stays_in_its_own_rows(
    where: str, wrong: float, dtype: torch.dtype, level: str, at_level: AtLevel
) -> None:
    at_level(level)
    lengths = (20, 37, 16)
    segments = Segments(lengths)
    tensors = [x.clone() for x in fused(lengths, 2, 2, 16, dtype)]
    clean = compiled.attend(*tensors, segments, scale=0.25, causal=False, window=None)  # type: ignore[misc]
    # One number of the second head, in the middle of the second sequence.
    tensors[("query", "key", "value").index(where)][30, 1, 5] = wrong
    got = compiled.attend(*tensors, segments, scale=0.25, causal=False, window=None)  # type: ignore[misc]
    expected = reference.attend(*tensors, segments, scale=0.25)  # type: ignore[misc]
    assert torch.equal(got.isfinite(), expected.isfinite())
    untouched = torch.ones_like(got, dtype=torch.bool)
    untouched[20:57, 1] = False
    assert torch.equal(got[untouched], clean[untouched])
    if where == "query":
        assert got[30, 1].isnan().all()
        assert got[20:57, 1].isnan().sum() == 16


@levels
def test_a_token_that_sees_nothing_gets_zeros(level: str, at_level: AtLevel) -> None:
    at_level(level)
    lengths = (100, 90)
    tensors = fused(lengths, 2, 2, 16, torch.float32)
    got = check(tensors, Segments(lengths, attended=(10, 90)), causal=False, window=20)
    assert got[:30].any(-1).all()
    assert not got[30:100].any()


@levels
@dtypes
@pytest.mark.parametrize("window", [None, 30])
def test_a_prefix_that_lies_elsewhere_comes_before_a_sequences_own_keys(
    window: int | None, dtype: torch.dtype, level: str, at_level: AtLevel
) -> None:
    at_level(level)
    before, rests = 45, (3, 60, 17)
    lengths = (before, *rests)
    tensors = fused(lengths, 4, 2, 32, dtype)
    segments = Segments(lengths, prefixes=(NO_PREFIX, *[Prefix(0, before)] * 3))
    got = compiled.attend(*tensors, segments, scale=0.2, causal=True, window=window)
    for start, end in zip(segments.starts[1:], segments.ends[1:], strict=True):
        whole = [torch.cat((x[:before], x[start:end])) for x in tensors]
        together = Segments((before + end - start,))
        expected = reference.attend(*(x.double() for x in whole), together, scale=0.2, causal=True, window=window)  # type: ignore[misc]
        assert (got[start:end].double() - expected[before:]).abs().max() <= tolerance(*tensors, 0.2)


@levels
@pytest.mark.parametrize("width", [8, 16, 24, 40, 64, 128])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 40)])
def test_floats_may_be_multiplied_as_those_of_bfloat16_are(
    causal: bool, window: int | None, biased: bool, width: int, level: str, at_level: AtLevel
) -> None:
    at_level(level)
    tensors = fused(SHORT, 4, 2, width, torch.float32)
    longest = max(SHORT)
    bias = torch.randn(4, longest, longest, generator=torch.Generator().manual_seed(1)) if biased else None
    options = {"scale": 0.2, "causal": causal, "window": window, "bias": bias}
    coarse = compiled.attend(*tensors, Segments(SHORT), coarse=True, **options)  # type: ignore[arg-type]
    assert coarse.dtype == torch.float32
    if level == "avx512_bf16":
        narrow = compiled.attend(*(x.bfloat16() for x in tensors), Segments(SHORT), **options)  # type: ignore[misc, arg-type]
        assert torch.equal(coarse.bfloat16(), narrow)
    else:
        assert torch.equal(coarse, compiled.attend(*tensors, Segments(SHORT), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("cores", [2, 5])
def test_several_cores_give_what_one_gives(cores: int) -> None:
    lengths = (1, 700, 3, 300, 5)
    tensors = fused(lengths, 4, 2, 32, torch.float32)
    segments = Segments(lengths)
    expected = check(tensors, segments, causal=True, window=None)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        got = compiled.attend(*tensors, segments, scale=32**-0.5, causal=True, window=None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, expected)


def test_it_may_be_called_from_several_threads_at_once() -> None:
    # Of several sizes, so that each thread's memory grows while others compute.
    packs = []
    for number in range(24):
        lengths = (1 + 13 * number % 90, 1 + 200 * number % 333)
        tensors = fused(lengths, 2, 2, 8 * (1 + number % 5), torch.float32)
        packs.append((tensors, Segments(lengths)))

    def run(pack: tuple[tuple[Tensor, Tensor, Tensor], Segments]) -> Tensor:
        return compiled.attend(*pack[0], pack[1], scale=0.3, causal=False, window=None)

    expected = [run(pack) for pack in packs]
    with ThreadPoolExecutor(4) as pool:
        for got, alone in zip(pool.map(run, packs * 5), expected * 5, strict=True):
            assert torch.equal(got, alone)


def test_it_takes_its_turn_where_it_can_and_only_there(at_level: AtLevel) -> None:
    lengths = (4, 9)
    segments = Segments(lengths)
    tensors = fused(lengths, 4, 2, 16, torch.float32)
    query, key, _ = tensors
    assert torch.equal(
        attend(*tensors, segments, scale=0.2),
        compiled.attend(*tensors, segments, scale=0.2, causal=False, window=None),
    )
    assert compiled.can_run(query, key, 0.2, None)
    assert not compiled.can_run(query, key, 0.2, 5.0)
    assert not compiled.can_run(query, key, -0.2, None)
    assert not compiled.can_run(query.half(), key.half(), 0.2, None)
    assert not compiled.can_run(query[..., :12], key[..., :12], 0.2, None)
    assert not compiled.can_run(query.to("meta"), key.to("meta"), 0.2, None)
    wide = torch.zeros(2, 1, 264)
    assert not compiled.can_run(wide, wide, 0.2, None)
    at_level("0")
    assert not compiled.can_run(query, key, 0.2, None)
    assert torch.equal(attend(*tensors, segments, scale=0.2), sdpa.attend(*tensors, segments, scale=0.2))


def test_the_table_of_segments_says_where_each_lies() -> None:
    assert Segments((3, 5)).table.tolist() == [[0, 3, 3, 0, 0], [3, 5, 5, 0, 0]]
    assert Segments((3, 5), attended=(1, 4)).table.tolist() == [[0, 3, 1, 0, 0], [3, 5, 4, 0, 0]]
    assert Segments((3,)).table.dtype == np.int64
