"""Every attention backend against the definition, and the definition against loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from poolhouse import kernels
from poolhouse.layers.attention import attend, reference, sdpa, varlen
from poolhouse.packing.pack import NO_PREFIX, Prefix, Segments

# Ragged; neighbours of equal length twice, so that one call takes several; a single token; longer than the windows.
LENGTHS = (5, 5, 1, 17, 17, 17, 2, 33)
# How many leading tokens of each are attended to: all, some; of the windows, some see none then.
ATTENDED = (5, 3, 1, 9, 9, 17, 1, 12)
# The first and the sixth are shared by those behind them: two of one shape, a single token, one that goes without.
SHARED = (Prefix(0, 5), Prefix(45, 17))
PREFIXES = (NO_PREFIX, SHARED[0], SHARED[0], SHARED[0], SHARED[0], NO_PREFIX, SHARED[1], SHARED[1])
HEADS, WIDTH = 4, 8
CASES = list(
    itertools.product(
        (False, True),  # causal
        (None, 0, 3, 100),  # window
        (4, 2, 1),  # key and value heads
        (False, True),  # bias
        (None, 5.0),  # softcap
    )
)


def inputs(
    kv_heads: int, bias: bool, dtype: torch.dtype = torch.float32, width: int = WIDTH
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    random = torch.Generator().manual_seed(1)
    total = sum(LENGTHS)
    # Scores well above 5, so that the softcap matters.
    query, key, value = (
        2 * torch.randn(total, heads, width, generator=random) for heads in (HEADS, kv_heads, kv_heads)
    )
    longest = max(LENGTHS) + max(prefix.length for prefix in SHARED)
    biases = torch.randn(HEADS, longest, longest, generator=random) if bias else None
    return (query.to(dtype), key.to(dtype), value.to(dtype)), biases


@pytest.mark.parametrize("attended", [None, ATTENDED])
@pytest.mark.parametrize(("causal", "window", "kv_heads", "bias", "softcap"), CASES)
def test_sdpa_equals_the_definition(
    causal: bool, window: int | None, kv_heads: int, bias: bool, softcap: float | None, attended: tuple[int, ...] | None
) -> None:
    tensors, biases = inputs(kv_heads, bias)
    options: dict[str, Any] = {
        "scale": 0.4,
        "causal": causal,
        "window": window,
        "bias": biases,
        "softcap": softcap,
    }
    segments = Segments(LENGTHS, attended=attended)
    expected = reference.attend(*tensors, segments, **options)
    got = sdpa.attend(*tensors, segments, **options)
    # Rounding of float32 sums of up to 33 terms near 2.
    assert torch.allclose(got, expected, atol=5e-6)
    # Either what was compiled, which has tests of its own, or this.
    if softcap is not None or kernels.level() is None:
        assert torch.equal(attend(*tensors, segments, **options), got)


@pytest.mark.parametrize(("causal", "window", "kv_heads", "bias", "softcap"), CASES)
def test_a_pack_equals_each_sequence_alone(
    causal: bool, window: int | None, kv_heads: int, bias: bool, softcap: float | None
) -> None:
    tensors, biases = inputs(kv_heads, bias)
    options: dict[str, Any] = {"scale": 0.4, "causal": causal, "window": window, "softcap": softcap}
    segments = Segments(LENGTHS)
    packed = attend(*tensors, segments, bias=biases, **options)
    for start, end in zip(segments.starts, segments.ends, strict=True):
        length = end - start
        corner = None if biases is None else biases[:, :length, :length]
        parts = [tensor[start:end] for tensor in tensors]
        alone = attend(*parts, Segments((length,)), bias=corner, **options)  # type: ignore[misc]
        assert torch.allclose(packed[start:end], alone, atol=5e-6)


@pytest.mark.parametrize("attended", [None, ATTENDED])
@pytest.mark.parametrize(("window", "kv_heads", "bias", "softcap"), [case[1:] for case in CASES if case[0]])
def test_a_rest_behind_its_prefix_equals_the_whole_sequence(
    window: int | None, kv_heads: int, bias: bool, softcap: float | None, attended: tuple[int, ...] | None
) -> None:
    tensors, biases = inputs(kv_heads, bias)
    options: dict[str, Any] = {"scale": 0.4, "causal": True, "window": window, "softcap": softcap}
    segments = Segments(LENGTHS, attended=attended, prefixes=PREFIXES)
    got = sdpa.attend(*tensors, segments, bias=biases, **options)
    assert torch.allclose(got, reference.attend(*tensors, segments, bias=biases, **options), atol=5e-6)
    for number, ((first, before), start, end) in enumerate(zip(PREFIXES, segments.starts, segments.ends, strict=True)):
        length = before + end - start
        corner = None if biases is None else biases[:, :length, :length]
        rows = [*range(first, first + before), *range(start, end)]
        kept = None if attended is None else [before + attended[number]]
        parts = [tensor[rows] for tensor in tensors]
        alone = reference.attend(*parts, Segments([length], attended=kept), bias=corner, **options)  # type: ignore[misc]
        assert torch.allclose(got[start:end], alone[before:], atol=5e-6)


def test_half_types_behind_a_prefix_stay_near_the_definition() -> None:
    tensors, _ = inputs(2, False, torch.bfloat16)
    segments = Segments(LENGTHS, prefixes=PREFIXES)
    options: dict[str, Any] = {"scale": 0.4, "causal": True}
    got = attend(*tensors, segments, **options)
    # Two answers and their shares are rounded besides the result: to 1/256 of values up to 8 each.
    assert (got.float() - reference.attend(*tensors, segments, **options).float()).abs().max() < 0.07


def test_the_keys_of_a_rest_are_those_of_its_prefix_and_its_own() -> None:
    rows, bounds, longest = Segments((3, 2, 1), prefixes=(NO_PREFIX, Prefix(0, 3), Prefix(1, 2))).keys
    assert rows.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 1, 2, 5]
    assert bounds.tolist() == [0, 3, 8, 11]
    assert longest == 5
    rows, bounds, longest = Segments((3, 2, 1), attended=(2, 2, 1)).keys
    assert (rows.tolist(), bounds.tolist(), longest) == ([0, 1, 3, 4, 5], [0, 2, 4, 5], 2)


@pytest.mark.parametrize("attended", [None, ATTENDED])
@pytest.mark.parametrize(("causal", "window", "kv_heads", "bias", "softcap"), CASES)
def test_the_definition_equals_loops_over_numbers(
    causal: bool, window: int | None, kv_heads: int, bias: bool, softcap: float | None, attended: tuple[int, ...] | None
) -> None:
    (query, key, value), biases = inputs(kv_heads, bias)
    segments = Segments(LENGTHS, attended=attended)
    got = reference.attend(
        query, key, value, segments, scale=0.4, causal=causal, window=window, bias=biases, softcap=softcap
    )
    start, length = segments.starts[3], LENGTHS[3]
    for head, row in itertools.product((0, 3), (0, 8, length - 1)):
        shared = head // (HEADS // kv_heads)
        seen = [
            column
            for column in range(length if attended is None else attended[3])
            if (not causal or column <= row) and (window is None or abs(column - row) <= window)
        ]
        scores = []
        for column in seen:
            score = 0.4 * float(query[start + row, head].double() @ key[start + column, shared].double())
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            scores.append(score + (0 if biases is None else float(biases[head, row, column])))
        if not seen:
            assert not got[start + row, head].any()
            continue
        weights = [math.exp(score - max(scores)) for score in scores]
        expected = sum(
            weight / sum(weights) * value[start + column, shared].double()
            for weight, column in zip(weights, seen, strict=True)
        )
        assert torch.allclose(got[start + row, head].double(), torch.as_tensor(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_half_types_stay_near_the_definition(dtype: torch.dtype, softcap: float | None) -> None:
    tensors, biases = inputs(2, True, dtype)
    segments = Segments(LENGTHS)
    options: dict[str, Any] = {"scale": 0.4, "window": 3, "bias": biases, "softcap": softcap}
    expected = reference.attend(*tensors, segments, **options)
    got = attend(*tensors, segments, **options)
    assert got.dtype == dtype
    # Scores of up to 20 in bfloat16 are off by 1/16, which moves a weight by that share.
    assert (got.float() - expected.float()).abs().max() < (0.25 if dtype == torch.bfloat16 else 0.04)


def test_variable_length_kernels_are_for_half_types_on_cuda_alone() -> None:
    (query, _, _), _ = inputs(4, False)
    assert not varlen.can_run(query, None, None)
    assert not varlen.can_run(query.to(torch.bfloat16), None, None)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 64, 128, 256])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 0, 3, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_variable_length_kernels_stay_near_the_definition(
    causal: bool, window: int | None, kv_heads: int, width: int, dtype: torch.dtype
) -> None:
    tensors, _ = inputs(kv_heads, False, dtype, width)
    on_device = [tensor.cuda() for tensor in tensors]
    assert varlen.can_run(on_device[0], None, None)
    options: dict[str, Any] = {"scale": 0.2, "causal": causal, "window": window}
    got = attend(*on_device, Segments(LENGTHS, "cuda"), **options)  # type: ignore[misc]
    expected = reference.attend(*tensors, Segments(LENGTHS), **options)
    # The kernel sums in float32 and rounds weights and result: two roundings of values up to 8.
    assert (got.cpu().float() - expected.float()).abs().max() < (0.07 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 0, 3, 100])
def test_rests_behind_prefixes_stay_near_the_definition_on_cuda(window: int | None, dtype: torch.dtype) -> None:
    tensors, _ = inputs(2, False, dtype)
    on_device = [tensor.cuda() for tensor in tensors]
    options: dict[str, Any] = {"scale": 0.2, "causal": True, "window": window}
    got = attend(*on_device, Segments(LENGTHS, "cuda", prefixes=PREFIXES), **options)  # type: ignore[misc]
    expected = reference.attend(*tensors, Segments(LENGTHS, prefixes=PREFIXES), **options)
    assert (got.cpu().float() - expected.float()).abs().max() < (0.07 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 3)])
def test_what_is_attended_to_in_part_stays_near_the_definition_on_cuda(
    causal: bool, window: int | None, dtype: torch.dtype
) -> None:
    tensors, _ = inputs(2, False, dtype)
    on_device = [tensor.cuda() for tensor in tensors]
    options: dict[str, Any] = {"scale": 0.2, "causal": causal, "window": window}
    got = attend(*on_device, Segments(LENGTHS, "cuda", ATTENDED), **options)  # type: ignore[misc]
    expected = reference.attend(*tensors, Segments(LENGTHS, attended=ATTENDED), **options)
    assert (got.cpu().float() - expected.float()).abs().max() < (0.07 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.cuda
@pytest.mark.parametrize(("bias", "softcap", "dtype"), [(True, None, torch.float16), (False, 5.0, torch.float16), (False, None, torch.float32)])  # fmt: skip
def test_what_variable_length_kernels_cannot_do_runs_all_the_same_on_cuda(
    bias: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    tensors, biases = inputs(2, bias, dtype)
    on_device = [tensor.cuda() for tensor in tensors]
    on_cuda = None if biases is None else biases.cuda()
    assert not varlen.can_run(on_device[0], on_cuda, softcap)
    options: dict[str, Any] = {"scale": 0.2, "causal": True, "window": 3, "softcap": softcap}
    got = attend(*on_device, Segments(LENGTHS, "cuda"), bias=on_cuda, **options)  # type: ignore[misc]
    expected = reference.attend(*tensors, Segments(LENGTHS), bias=biases, **options)
    assert (got.cpu().float() - expected.float()).abs().max() < (0.03 if dtype == torch.float16 else 1e-4)
