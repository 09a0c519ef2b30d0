"""MaxSim of packed documents, against a plain double loop."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poolhouse.kernels.build import LEVELS
from poolhouse.outputs import Array
from poolhouse.vectors import max_sim as kernel
from poolhouse.vectors.max_sim import max_sim, max_sim_packed, max_sim_pairs, max_sim_tensors, row_offsets
from poolhouse.vectors.precision import PRECISIONS, Calibration, Precision, dequantize, quantize

# Sums of at most a few hundred products of unit vectors, added in another order.
TOLERANCE = 1e-4
# Beside its inputs, as its docstring says.
MAX_BYTES = 8 * 2**20


def unit_rows(rows: int, width: int, seed: int) -> Array:
    numbers = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    unit: Array = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    return unit


def texts(lengths: Sequence[int], width: int, seed: int = 0) -> list[Array]:
    return [unit_rows(length, width, seed + index) for index, length in enumerate(lengths)]


def double_loop(query: Array, document: Array) -> float:
    if not len(document):
        return 0.0
    return sum(max(float(np.dot(mine.astype(float), its)) for its in document) for mine in query)


def packed(query: Array, documents: Sequence[Array]) -> Array:
    return max_sim_packed(query, np.concatenate(documents), row_offsets([len(document) for document in documents]))


def with_tensors(query: Array, documents: Sequence[Array], device: str = "cpu") -> Array:
    offsets = torch.from_numpy(row_offsets([len(document) for document in documents])).to(device)
    values = torch.from_numpy(np.concatenate(documents)).to(device)
    scores = max_sim_tensors(torch.from_numpy(query).to(device), values, offsets)
    assert scores.device.type == device
    answer: Array = scores.cpu().numpy()
    return answer


def in_pairs(query: Array, documents: Sequence[Array]) -> Array:
    return max_sim_pairs([query] * len(documents), documents)


FORMS: list[Callable[[Array, Sequence[Array]], Array]] = [max_sim, packed, in_pairs, with_tensors]


@pytest.fixture(params=["0", *(one.name for one in LEVELS)])
def level(request: pytest.FixtureRequest, at_level: Callable[[str], None]) -> None:
    """Once without compiled kernels, and with those of each level."""
    at_level(request.param)


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
# Numbers per block, from less than a row's to more than all.
@pytest.mark.parametrize("most", [1, 7, 24, 10_000])
@given(lengths=LENGTHS, query_rows=st.integers(0, 6), width=st.sampled_from([1, 3, 8]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ragged_documents_score_as_in_a_double_loop(
    form: Callable[[Array, Sequence[Array]], Array],
    most: int,
    lengths: list[int],
    query_rows: int,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "MAX_PRODUCTS", most)
    monkeypatch.setattr(kernel, "MAX_QUERY_ROWS", 4)
    query, documents = unit_rows(query_rows, width, 99), texts(lengths, width)
    scores = form(query, documents)
    assert scores.dtype == np.float32
    expected = [double_loop(query, document) for document in documents]
    assert scores == pytest.approx(expected, abs=1e-5)


@given(lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=12))
def test_each_query_meets_the_document_at_its_place(lengths: list[tuple[int, int]]) -> None:
    queries, documents = texts([mine for mine, _ in lengths], 4, 50), texts([its for _, its in lengths], 4)
    expected = [double_loop(query, document) for query, document in zip(queries, documents, strict=True)]
    assert max_sim_pairs(queries, documents) == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_products_may_all_be_negative(form: Callable[[Array, Sequence[Array]], Array]) -> None:
    query, document = np.array([[1, 0], [2, 0]], np.float32), np.array([[-1, 5], [-3, 0]], np.float32)
    assert form(query, [document, document[:0], document[1:]]).tolist() == [-3, 0, -9]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_document_longer_than_a_block_is_one_document(form: Callable[[Array, Sequence[Array]], Array]) -> None:
    query, documents = unit_rows(40, 16, 5), texts([3, 9_000, 0, 5], 16)
    expected = [float((query @ document.T).max(axis=1).sum()) if len(document) else 0 for document in documents]
    assert kernel.MAX_PRODUCTS < 9_000 * 40
    assert form(query, documents) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("query_rows", [1, 7, 16, 33, 100])
@pytest.mark.parametrize("form", [max_sim, packed], ids=lambda form: form.__name__)
def test_queries_of_any_number_of_rows_meet_documents_of_any(
    form: Callable[[Array, Sequence[Array]], Array], query_rows: int
) -> None:
    # Around the tiles of 6 and 8 rows, and more than stay in the nearest cache.
    query, documents = unit_rows(query_rows, 20, 3), texts([1, 5, 6, 7, 8, 9, 16, 0, 230, 700], 20)
    expected = [double_loop(query, document) for document in documents]
    assert form(query, documents) == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("form", [max_sim, packed], ids=lambda form: form.__name__)
def test_what_is_not_finite_is_in_the_score_of_its_document(
    form: Callable[[Array, Sequence[Array]], Array], wrong: float
) -> None:
    query, documents = np.abs(unit_rows(5, 8, 2)), texts([9, 30, 4], 8)
    expected = form(query, documents)
    for row in (0, 13, 29):
        spoilt = documents[1].copy()
        spoilt[row, 3] = wrong
        scores = form(query, [documents[0], spoilt, documents[2]])
        assert scores[[0, 2]].tolist() == expected[[0, 2]].tolist()
        assert str(scores[1]) == str(wrong)


@pytest.mark.usefixtures("level")
def test_documents_that_do_not_lie_plain_score_alike() -> None:
    query, documents = unit_rows(5, 8, 2), texts([9, 30, 4], 8)
    expected = [double_loop(query, document) for document in documents]
    turned = [np.asfortranarray(document) for document in documents]
    assert max_sim(np.asfortranarray(query), turned) == pytest.approx(expected, abs=1e-5)
    assert max_sim(query[:, ::-1], [document[:, ::-1] for document in documents]) == pytest.approx(expected, abs=1e-5)
    assert max_sim(query, [document.astype(np.float64) for document in documents]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"shape|mismatch"):
        max_sim(query, [document[:, :7] for document in documents])


@pytest.mark.parametrize("cores", ["1", "2", "5"])
def test_much_work_is_shared_by_threads(cores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, documents = unit_rows(64, 128, 5), texts([3000, 1, 0, 5000, 20, 8000], 128)
    monkeypatch.setattr(kernel, "_cores", lambda: int(cores))
    expected = [float((query @ document.T).max(axis=1).sum()) if len(document) else 0 for document in documents]
    assert max_sim(query, documents) == pytest.approx(expected, abs=TOLERANCE)


def test_a_user_may_limit_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert kernel._cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert kernel._cores() >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert kernel._cores() < 100_000


@pytest.mark.parametrize("precision", PRECISIONS)
def test_codes_score_as_the_vectors_that_they_stand_for(precision: Precision) -> None:
    query, documents = unit_rows(5, 32, 7), texts([4, 0, 300, 1], 32)
    offsets = row_offsets([len(document) for document in documents])
    codes = quantize(np.concatenate(documents), precision)
    vectors = np.split(dequantize(codes, precision), offsets[1:-1])
    scores = max_sim_packed(query, codes, offsets, precision)
    assert scores == pytest.approx([double_loop(query, document) for document in vectors], abs=1e-5)


def test_codes_of_stored_ranges_are_read_by_them() -> None:
    query, (document,) = unit_rows(5, 32, 7), texts([30], 32)
    ranges = Calibration.of(3 * document)
    codes = quantize(3 * document, "int8", ranges)
    (score,) = max_sim_packed(query, codes, row_offsets([30]), "int8", ranges)
    assert score == pytest.approx(3 * double_loop(query, document), rel=0.02)
    assert score == pytest.approx(double_loop(query, dequantize(codes, "int8", ranges)), abs=1e-4)


def test_half_precision_is_summed_in_single() -> None:
    # 2048 + 1 is not a float16.
    query, document = np.array([[2048], [1]], np.float16), np.array([[1]], np.float16)
    assert max_sim_packed(query, document, row_offsets([1]), "float16").tolist() == [2049]
    assert max_sim(query.astype(np.float32), [document]).tolist() == [2049]
    scores = max_sim_tensors(torch.from_numpy(query), torch.from_numpy(document), torch.tensor([0, 1]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [2049]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_query_and_hundreds_of_documents_take_a_few_mebibytes_more(precision: Precision) -> None:
    documents = texts([300] * 300, 128)
    codes, offsets = quantize(np.concatenate(documents), precision), row_offsets([300] * 300)
    query = unit_rows(32, 128, 1)
    peak = _peak(lambda: max_sim_packed(query, codes, offsets, precision))
    assert peak < MAX_BYTES
    if precision == "float32":
        assert _peak(lambda: max_sim(query, documents)) < MAX_BYTES


def test_long_texts_and_many_pairs_take_a_few_mebibytes_more() -> None:
    query, document = unit_rows(8192, 64, 0), unit_rows(8192, 64, 1)
    assert _peak(lambda: max_sim(query, [document])) < MAX_BYTES
    assert _peak(lambda: max_sim_pairs([query], [document])) < MAX_BYTES
    assert _peak(lambda: max_sim_pairs([query[:32]] * 500, [document[:300]] * 500)) < MAX_BYTES


def _peak(call: Callable[[], object]) -> int:
    """Bytes that a call has beside what was there before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.cuda
@pytest.mark.parametrize("lengths", [[3, 0, 700, 1], [0], [5] * 400, [70_000]])
def test_a_gpu_scores_as_the_cpu(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_MAX_PRODUCTS_ON_DEVICES", 2**16)
    query, documents = unit_rows(32, 64, 3), texts(lengths, 64)
    assert with_tensors(query, documents, "cuda") == pytest.approx(max_sim(query, documents), abs=TOLERANCE)
