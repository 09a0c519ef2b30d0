"""Output precisions against torch's casts and sentence-transformers' codes, and what calibrations take and refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file
from sentence_transformers import quantize_embeddings

from poolhouse import LLM, ConfigError, InvalidRequest, PoolingParams
from poolhouse.data import passages, queries, ragged_texts
from poolhouse.vectors.precision import PRECISIONS, Calibration, Precision, dequantize, parse_precision, quantize
from tests.checkpoints import save_checkpoint

# Every upper half of a float32, with lower halves at, around and between the ties of rounding.
LOWER_HALVES = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRIX = arrays(np.float32, st.tuples(st.integers(1, 4), st.just(8)), elements=FINITE)


def all_kinds_of_floats() -> np.ndarray:
    upper = np.arange(65536, dtype=np.uint32) << 16
    numbers = np.concatenate([(upper | lower).view(np.float32) for lower in LOWER_HALVES])
    return numbers[np.isfinite(numbers)]


def unit_vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


FP8 = [("fp8_e4m3", torch.float8_e4m3fn, 448.0), ("fp8_e5m2", torch.float8_e5m2, 57344.0)]


@pytest.mark.parametrize(("precision", "dtype", "largest"), FP8)
def test_fp8_rounds_as_torch_does_and_saturates_beyond(
    precision: Precision, dtype: torch.dtype, largest: float
) -> None:
    numbers = all_kinds_of_floats()
    inside = np.abs(numbers) <= largest
    expected = torch.from_numpy(numbers[inside]).to(dtype).view(torch.uint8).numpy()
    assert np.array_equal(quantize(numbers[inside], precision), expected)
    beyond = numbers[~inside]
    assert np.array_equal(dequantize(quantize(beyond, precision), precision), np.copysign(np.float32(largest), beyond))


@pytest.mark.parametrize(("precision", "dtype", "largest"), FP8)
def test_fp8_is_read_as_torch_reads_it(precision: Precision, dtype: torch.dtype, largest: float) -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(dtype).float().numpy()
    assert np.array_equal(dequantize(codes, precision), expected, equal_nan=True)
    assert np.isnan(dequantize(quantize(np.array([np.nan], np.float32), precision), precision)[0])


def test_bfloat16_and_float16_round_as_torch_does() -> None:
    numbers = np.append(all_kinds_of_floats(), np.array([np.inf, -np.inf], np.float32))
    tensor = torch.from_numpy(numbers)
    codes = quantize(numbers, "bfloat16")
    assert np.array_equal(codes, tensor.to(torch.bfloat16).view(torch.uint16).numpy())
    assert np.array_equal(dequantize(codes, "bfloat16"), tensor.to(torch.bfloat16).float().numpy())
    assert np.array_equal(quantize(numbers, "float16"), tensor.to(torch.float16).numpy())
    nan = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(dequantize(quantize(nan, "bfloat16"), "bfloat16")).all()


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_int8_has_the_codes_of_sentence_transformers_for_the_same_ranges(precision: Any) -> None:
    corpus, others = unit_vectors(200, 48), 1.5 * unit_vectors(300, 48, seed=1)
    corpus[:, 5] = 0.25  # a dimension without any range
    calibration = Calibration.of(corpus)
    ranges = np.stack([calibration.minimum, calibration.maximum])
    for vectors in (corpus, others):
        ours = quantize(vectors, precision, calibration)
        theirs = quantize_embeddings(vectors, precision, ranges=ranges)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_are_those_of_sentence_transformers_but_for_zeros(precision: Any) -> None:
    vectors = unit_vectors(50, 48)
    ours, theirs = quantize(vectors, precision), quantize_embeddings(vectors, precision)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)
    zeros = np.zeros((1, 8), np.float32)
    assert quantize(zeros, "ubinary").tolist() == [[255]]
    assert quantize_embeddings(zeros, "ubinary").tolist() == [[0]]


def test_the_first_value_is_the_highest_bit_and_binary_is_the_byte_less_128() -> None:
    vector = np.array([1, -1, -1, -1, -1, -1, -1, 1], np.float32)
    assert quantize(vector, "ubinary").tolist() == [0b10000001]
    assert quantize(vector, "binary").tolist() == [0b10000001 - 128]
    assert np.array_equal(np.sign(dequantize(quantize(vector, "binary"), "binary")), vector)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_need_whole_bytes(precision: Precision) -> None:
    with pytest.raises(InvalidRequest, match="multiple of 8, got 12") as caught:
        quantize(np.ones((2, 12), np.float32), precision, field="embed_dtype")
    assert caught.value.parameter == "embed_dtype"


def test_without_calibration_int8_is_in_proportion_to_the_values() -> None:
    vectors = unit_vectors(100, 96)
    codes = quantize(vectors, "int8")
    scaled = 24 * np.sqrt(96) * vectors
    # Half a step, and what float32 adds to numbers up to 128.
    assert np.abs(codes - np.clip(scaled, -128, 127)).max() <= 0.5 + 1e-4
    assert np.array_equal(quantize(vectors, "uint8"), codes.astype(np.int16) + 128)
    assert np.allclose(dequantize(codes, "int8"), codes / (24 * np.sqrt(96)), atol=1e-7)
    assert quantize(np.zeros(96, np.float32), "int8").tolist() == [0] * 96


def test_without_calibration_a_lone_value_saturates() -> None:
    vector = np.zeros(64, np.float32)
    vector[3] = 1
    assert quantize(vector, "int8")[3] == 127
    assert quantize(-vector, "int8")[3] == -128


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_vectors_of_another_length_need_a_calibration(precision: Precision) -> None:
    vectors = unit_vectors(3, 16)
    vectors[1] *= 14
    with pytest.raises(InvalidRequest, match=re.escape("one has length 14. Let them be normalised")) as caught:
        quantize(vectors, precision)
    assert caught.value.parameter == "precision"
    assert quantize(vectors, precision, Calibration.of(vectors)).shape == (3, 16)


@given(MATRIX, MATRIX)
def test_int8_saturates_and_depends_on_nothing_else(corpus: np.ndarray, vectors: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        calibration = Calibration.of(corpus)
        codes = quantize(vectors, "uint8", calibration)
    for row, vector in zip(codes, vectors, strict=True):
        assert np.array_equal(row, quantize(vector, "uint8", calibration))
    assert (codes[vectors < calibration.minimum] == 0).all()
    wide = (vectors >= calibration.maximum) & (calibration.maximum - calibration.minimum >= 255)
    # Division by a rounded step may fall short of the last one by an ulp.
    assert (codes[wide] >= 254).all()


@given(arrays(np.float32, (5, 8), elements=st.floats(-4, 4, width=32)))
def test_int8_inside_its_ranges_is_off_by_half_a_step_at_most(vectors: np.ndarray) -> None:
    calibration = Calibration.of(vectors)
    step = (calibration.maximum - calibration.minimum) / 255
    error = np.abs(dequantize(quantize(vectors, "int8", calibration), "int8", calibration) - vectors)
    # The ends of the ranges are up to 4, where float32 has steps of 5e-7.
    assert (error <= step / 2 + 2e-6).all()


@given(MATRIX, st.sampled_from(["float16", "bfloat16", "fp8_e4m3", "fp8_e5m2", "binary", "ubinary"]))
def test_every_vector_is_converted_by_itself(vectors: np.ndarray, precision: Precision) -> None:
    together = quantize(vectors, precision)
    assert np.array_equal(together, np.stack([quantize(vector, precision) for vector in vectors]))


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    calibration = Calibration.of(unit_vectors(10, 24))
    calibration.save(tmp_path / "ranges.safetensors")
    loaded = Calibration.load(tmp_path / "ranges.safetensors")
    assert np.array_equal(loaded.minimum, calibration.minimum)
    assert np.array_equal(loaded.maximum, calibration.maximum)


def test_joined_ranges_are_those_of_all_vectors() -> None:
    vectors = unit_vectors(40, 24)
    joined = Calibration.of(vectors[:15]).joined(Calibration.of(vectors[15:]))
    assert np.array_equal(joined.minimum, vectors.min(0))
    assert np.array_equal(joined.maximum, vectors.max(0))


F32 = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": F32}, "holds weight instead of minimum and maximum"),
        ({"minimum": F32}, "holds minimum instead of"),
        ({"minimum": F32, "maximum": F32, "more": F32}, "holds maximum, minimum, more instead of"),
        ({"minimum": F32, "maximum": np.zeros(5, np.float32)}, "got shapes [(4,), (5,)]"),
        ({"minimum": F32[None], "maximum": F32[None]}, "got shapes [(1, 4), (1, 4)]"),
        ({"minimum": F32[:0], "maximum": F32[:0]}, "got shapes [(0,), (0,)]"),
        ({"minimum": F32.astype(np.float64), "maximum": F32}, "is float32, got float64"),
        ({"minimum": F32, "maximum": F32 + np.float32(np.nan)}, "holds NaN"),
        ({"minimum": F32 + np.eye(4, dtype=np.float32)[2], "maximum": F32}, "minimum of dimension 2 is larger"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    path = tmp_path / "ranges.safetensors"
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "none", tmp_path / "text"):
        with pytest.raises(ConfigError, match=re.escape(f"{path} cannot be read as a calibration")):
            Calibration.load(path)


@pytest.mark.parametrize("vectors", [np.zeros((0, 4), np.float32), np.zeros(4, np.float32)])
def test_a_calibration_needs_vectors(vectors: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="at least one vector"):
        Calibration.of(vectors)


def test_an_unknown_precision_is_met_with_the_nearest() -> None:
    assert [parse_precision(precision) for precision in PRECISIONS] == list(get_args(Precision))
    with pytest.raises(InvalidRequest, match="Did you mean 'float16'") as caught:
        parse_precision("flaot16")
    assert caught.value.parameter == "precision"


def test_longer_vectors_than_the_calibration_are_refused() -> None:
    calibration = Calibration.of(unit_vectors(10, 8))
    with pytest.raises(InvalidRequest, match="covers 8 dimensions, and the vectors have 16"):
        quantize(unit_vectors(2, 16), "int8", calibration)


def test_ranges_without_any_extent_fit_cut_vectors_too() -> None:
    assert Calibration(F32, F32).fitting(2).width == 2


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The embedded model, calibrated on some hundreds of texts, offering cut vectors."""
    path = tmp_path_factory.mktemp("ranges") / "ranges.safetensors"
    texts = passages() + queries() + [text[:200] for text in ragged_texts(400)]
    with LLM() as plain:
        Calibration.of(plain.embed_array(texts, use_tqdm=False)).save(path)
    with LLM(int8_calibration=str(path), matryoshka_dimensions=(64, 128, 256)) as llm:
        yield llm


def test_embed_array_takes_every_precision(llm: LLM) -> None:
    texts = passages()[:5]
    vectors = llm.embed_array(texts)
    assert vectors.dtype == np.float32
    for precision in PRECISIONS:
        codes = llm.embed_array(texts, precision=precision)
        assert np.array_equal(codes, quantize(vectors, precision, llm.engine.facts.calibration)), precision
    with pytest.raises(InvalidRequest, match="precision='int4' is not one of"):
        llm.embed_array(texts, precision="int4")


# Measured: the mean error of a cosine, and how many of the ten nearest passages stay. Bits are coarse at 384 dimensions.
QUALITY = [
    ("float16", False, 2e-5, 1.0),
    ("bfloat16", False, 2e-4, 1.0),
    ("fp8_e4m3", False, 2e-3, 0.97),
    ("fp8_e5m2", False, 4e-3, 0.96),
    ("int8", False, 1e-3, 0.98),
    ("int8", True, 5e-4, 0.98),
    ("binary", False, 7e-2, 0.6),
]


@pytest.mark.parametrize(("precision", "calibrated", "error", "kept"), QUALITY)
def test_cosines_and_their_order_survive(
    llm: LLM, precision: Precision, calibrated: bool, error: float, kept: float
) -> None:
    asked, corpus = llm.embed_array(queries()), llm.embed_array(passages())
    calibration = llm.engine.facts.calibration if calibrated else None
    exact = asked @ corpus.T
    back = [
        normalized(dequantize(quantize(vectors, precision, calibration), precision, calibration))
        for vectors in (asked, corpus)
    ]
    got = back[0] @ back[1].T
    assert np.abs(got - exact).mean() < error
    tens = [np.argsort(-scores, axis=1)[:, :10] for scores in (exact, got)]
    shared = [len(set(one) & set(other)) / 10 for one, other in zip(*tens, strict=True)]
    assert np.mean(shared) >= kept


def test_ranges_of_whole_vectors_are_widened_for_cut_ones(llm: LLM) -> None:
    calibration = llm.engine.facts.calibration
    assert calibration is not None
    for dimensions in (64, 128, 256):
        vectors = llm.embed_array(passages(), pooling_params=PoolingParams(dimensions=dimensions))
        ranges = calibration.fitting(dimensions)
        outside = (vectors < ranges.minimum) | (vectors > ranges.maximum)
        assert outside.mean() < 0.01
        codes = llm.embed_array(passages(), pooling_params=PoolingParams(dimensions=dimensions), precision="int8")
        assert np.array_equal(codes, quantize(vectors, "int8", calibration))


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranges.safetensors"
    Calibration.of(unit_vectors(10, 32)).save(path)
    with pytest.raises(ConfigError, match="ranges are those of 32 dimensions, and the model's vectors have 384"):
        LLM(int8_calibration=str(path))
    with pytest.raises(ConfigError, match="cannot be read as a calibration"):
        LLM(int8_calibration=str(tmp_path / "none"))
    with LLM(int8_calibration=str(path), matryoshka_dimensions=(32,)) as llm:
        assert llm.embed_array("x", pooling_params=PoolingParams(dimensions=32), precision="int8").shape == (1, 32)
        with pytest.raises(InvalidRequest, match="covers 32 dimensions, and the vectors have 384"):
            llm.embed_array("x", precision="int8")


def test_a_model_without_vectors_takes_no_calibration(tmp_path: Path) -> None:
    path = tmp_path / "ranges.safetensors"
    Calibration.of(unit_vectors(10, 32)).save(path)
    save_checkpoint(tmp_path / "model", "bert, wordpiece", "ForSequenceClassification")
    with pytest.raises(ConfigError, match="the model makes no vectors"):
        LLM(str(tmp_path / "model"), int8_calibration=str(path))
