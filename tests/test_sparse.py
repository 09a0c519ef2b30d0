"""Sparse vectors as callers get them: how answers become entries, pruning, forms for indexes, and what is refused."""

from __future__ import annotations

import asyncio
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poolhouse import LLM, InvalidRequest, PoolingParams, SparseMatrix, SparseVector, UnsupportedTask
from poolhouse.engine.request import Answer, Request
from poolhouse.inputs.prompts import Prompt
from poolhouse.llm import llm
from poolhouse.packing.tokens import Tokens
from poolhouse.plans import several
from poolhouse.plans.sparse import SparseOptions, dot, plan
from poolhouse.tasks import SparseHead
from poolhouse.testing import FakeEngine
from tests.models.tiny import IDS, LAYERS, TEXTS, WORDS, save, tokenizer

BY_TOKEN = SparseHead("token_classify", "token", 99, (0, 2), frozenset((0, 1, 2)))
BY_ENTRY = SparseHead("embed", "vocabulary", 8)
MASKED = ("embed", "token_embed")


def sparse(head: SparseHead, array: Any, ids: Any, max_tokens: int = 512, **options: Any) -> SparseVector:
    engine = FakeEngine(tasks=(head.task,), sparse=head, max_tokens=max_tokens)
    # A fake engine knows words of texts that it has read, and these ids are of none.
    engine.token_strings = lambda ids: [f"token {token}" for token in ids]  # type: ignore[method-assign]
    made = plan(engine, [Prompt("a text")], SparseOptions(**options))
    (request,) = made.requests
    assert request.task == head.task
    answer = Answer(np.array(array, dtype=np.float32), Tokens(np.array(ids)))
    return made.finish([answer])[0].vector


def test_weights_of_a_vocabulary_beside_other_tasks_need_their_activation() -> None:
    engine, raw = FakeEngine(tasks=MASKED, sparse=BY_ENTRY), PoolingParams(use_activation=False)
    with pytest.raises(InvalidRequest, match="need use_activation"):
        several.plan(engine, ["sparse", "token_embed"], SparseOptions(), raw)
    assert several.plan(engine, ["token_embed"], SparseOptions(), raw).sparse is None
    found = several.plan(engine, ["sparse", "token_embed"], SparseOptions())
    assert (found.first, found.further) == ("token_embed", ("embed",))


@pytest.mark.parametrize(
    ("ids", "rows", "expected"),
    [
        ([0, 9, 5, 2], [0.5, 0.25], {5: 0.25, 9: 0.5}),
        # A token that comes again counts with its largest weight.
        ([0, 9, 5, 9, 9, 2], [0.5, 0.25, 0.75, 0.125], {5: 0.25, 9: 0.75}),
        # What weighs nothing has no entry, and neither have special tokens, wherever they stand.
        ([0, 9, 1, 2, 0, 2], [0.0, 0.5, 0.5, 0.5], {}),
        # Without special tokens at its ends every token has a row.
        ([9, 5], [0.5, 0.25], {5: 0.25, 9: 0.5}),
        ([0, 2], [], {}),
        ([2, 0], [0.5, 0.5], {}),
    ],
)
def test_a_token_weighs_once_with_its_largest_weight(ids: Any, rows: Any, expected: Any) -> None:
    got = sparse(BY_TOKEN, np.array(rows).reshape(-1, 1), ids)
    assert got.as_dict() == expected
    assert (got.indices, got.values) == (list(expected), list(expected.values()))
    assert got.ids.dtype == np.int64
    assert got.weights.dtype == np.float32


def test_each_piece_of_a_long_text_has_ends_of_its_own() -> None:
    # Pieces of 3: [0, 9, 2], [0, 5, 6], [7, 2]; an end of a piece that is a special token has no row.
    got = sparse(BY_TOKEN, [[0.1], [0.2], [0.3], [0.4]], [0, 9, 2, 0, 5, 6, 7, 2], max_tokens=3)
    assert got.as_dict() == pytest.approx({5: 0.2, 6: 0.3, 7: 0.4, 9: 0.1})


def test_a_vector_of_the_vocabulary_has_its_nonzero_entries() -> None:
    got = sparse(BY_ENTRY, [0, 0.5, 0, 0, 0.25, 0, 0, 2], [1])
    assert got.as_dict() == {1: 0.5, 4: 0.25, 7: 2}
    assert got.as_tokens() == {"token 1": 0.5, "token 4": 0.25, "token 7": 2}
    assert sparse(BY_ENTRY, np.zeros(8), [1]).as_dict() == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, [4]),
        ({"top_k": 3}, [1, 2, 4]),
        ({"top_k": 99}, [1, 2, 4, 6]),
        ({"threshold": 0.5}, [1, 2, 4]),
        ({"threshold": 0}, [1, 2, 4, 6]),
        ({"threshold": 0.3, "top_k": 2}, [1, 4]),
        ({"threshold": 9}, []),
    ],
)
def test_the_largest_entries_are_kept_of_equal_ones_the_first(options: Any, expected: list[int]) -> None:
    assert sparse(BY_ENTRY, [0, 0.5, 0.5, 0, 0.75, 0, 0.25, 0], [1], **options).indices == expected


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": "much"}, "threshold"),
        ({"params": PoolingParams(use_activation=False)}, "use_activation"),
        ({"params": PoolingParams(dimensions=3)}, "dimensions"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: Any, parameter: str) -> None:
    with pytest.raises(InvalidRequest, match=parameter) as raised:
        plan(FakeEngine(sparse=BY_ENTRY), [Prompt("a")], SparseOptions(**options))
    assert raised.value.parameter == parameter


def test_a_model_without_such_a_head_says_what_it_has() -> None:
    with pytest.raises(UnsupportedTask, match=r"no sparse vectors.*Supported tasks: \['embed', 'token_embed'\]"):
        plan(FakeEngine(), [Prompt("a")], SparseOptions())
    with LLM() as llm:
        assert llm.engine.facts.sparse is None
        for method in (llm.embed_sparse, llm.embed_sparse_array):
            with pytest.raises(UnsupportedTask, match="no sparse vectors"):
                method("a")


def test_a_product_is_that_of_the_entries_that_both_have() -> None:
    one = SparseVector(np.array([1, 4, 7]), np.array([0.5, 2, 3], dtype=np.float32))
    other = SparseVector(np.array([0, 4, 7, 9]), np.array([5, 0.5, 2, 1], dtype=np.float32))
    none = SparseVector(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
    assert dot(one, other) == dot(other, one) == 7
    assert dot(one, none) == 0


def test_a_plan_carries_what_a_request_says() -> None:
    options = SparseOptions(PoolingParams(truncate_prompt_tokens=7), "query", "query")
    (request,) = plan(FakeEngine(sparse=BY_ENTRY), [Prompt("a")], options).requests
    assert (request.prompt_name, request.input_type, request.params.truncate_prompt_tokens) == ("query", "query", 7)


@pytest.fixture(scope="module")
def splade(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("splade")
    tokenizer(folder)
    save(folder, "BertForMaskedLM", "BertConfig", LAYERS, std=0.1)
    with LLM(str(folder), hf_overrides={"architectures": ["BertSpladeSparseEmbeddingModel"]}) as llm:
        yield llm


def test_a_corpus_is_one_matrix_in_compressed_rows(splade: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    # Windows of two texts.
    monkeypatch.setattr(llm, "_MAX_NUMBERS", 2 * 99)
    matrix, dense = splade.embed_sparse_array(TEXTS), splade.embed_array(TEXTS)
    assert matrix.shape == dense.shape == (len(TEXTS), 99)
    assert (matrix.indptr.dtype, matrix.indices.dtype, matrix.values.dtype) == (np.int64, np.int32, np.float32)
    filled = np.zeros(matrix.shape, dtype=np.float32)
    filled[np.repeat(np.arange(len(TEXTS)), np.diff(matrix.indptr)), matrix.indices] = matrix.values
    assert np.allclose(filled, dense, atol=1e-6)
    from scipy.sparse import csr_matrix

    made = csr_matrix((matrix.values, matrix.indices, matrix.indptr), shape=matrix.shape)
    assert np.array_equal(made.toarray(), filled)
    assert splade.embed_sparse_array(TEXTS, top_k=4).indptr.tolist() == list(range(0, 4 * len(TEXTS) + 1, 4))
    assert repr(SparseMatrix.of([], 99)) == "SparseMatrix(shape=(0, 99), entries=0)"


def test_a_corpus_is_read_a_window_at_a_time(splade: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_MAX_NUMBERS", 2 * 99)
    sizes: list[int] = []
    submit = splade.engine.submit
    monkeypatch.setattr(
        splade.engine, "submit", lambda requests, *how: (sizes.append(len(requests)), submit(requests, *how))[1]
    )
    got = splade.embed_sparse([*TEXTS, TEXTS[0]])
    assert [size for size in sizes if size] == [2, 2, 2, 1]
    assert got[0].outputs.as_dict() == pytest.approx(got[-1].outputs.as_dict(), abs=1e-6)
    assert [output.prompt_token_ids for output in got[:1]] == [[IDS["cls"], 4, 11, 18, IDS["sep"]]]


def test_two_windows_are_in_memory_at_once(splade: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_MAX_NUMBERS", 2 * 99)
    submitted: list[weakref.ref[Future[Answer]]] = []
    alive: list[int] = []

    def answer_at_once(requests: list[Request], *_: object) -> list[Future[Answer]]:
        submitted.extend(weakref.ref(request.future) for request in requests)
        alive.append(sum(future() is not None for future in submitted))
        for request in requests:
            request.future.set_result(Answer(np.ones(99, dtype=np.float32), Tokens(np.array([1]))))
        return [request.future for request in requests]

    monkeypatch.setattr(splade.engine, "submit", answer_at_once)
    splade.embed_sparse([*TEXTS, *TEXTS])
    assert len(alive) > 2
    assert max(alive) == 4


def test_the_first_failure_is_raised_and_the_rest_cancelled(splade: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_MAX_NUMBERS", 99)
    with pytest.raises(InvalidRequest, match="tokens"):
        splade.embed_sparse([TEXTS[0], "w1 " * 600, TEXTS[1]])
    assert len(splade.embed_sparse(TEXTS)) == len(TEXTS)


def test_coroutines_get_the_same(splade: LLM) -> None:
    got = asyncio.run(splade.embed_sparse_async(TEXTS, top_k=5))
    expected = splade.embed_sparse(TEXTS, top_k=5)
    for one, other in zip(got, expected, strict=True):
        assert one.outputs.indices == other.outputs.indices
        assert np.allclose(one.outputs.weights, other.outputs.weights, atol=1e-5)
        assert len(one.outputs) == 5
        assert all(token in {*WORDS, "[CLS]", "[PAD]", "[SEP]", "[UNK]", ""} for token in one.outputs.tokens)


def test_cuts_are_reported_and_parameters_are_one_for_all(splade: LLM) -> None:
    (output,) = splade.embed_sparse(TEXTS[3], pooling_params=PoolingParams(truncate_prompt_tokens=6))
    assert (output.truncated, output.original_tokens, len(output.prompt_token_ids)) == (True, 22, 6)
    assert repr(output.outputs) == f"SparseVector(entries={len(output.outputs)})"
    with pytest.raises(InvalidRequest, match="one PoolingParams for all prompts"):
        splade.embed_sparse(TEXTS, pooling_params=[PoolingParams()] * len(TEXTS))  # type: ignore[arg-type]


def test_long_texts_in_pieces_weigh_all_their_tokens(tmp_path: Path) -> None:
    tokenizer(tmp_path, "roberta")
    save(tmp_path, "XLMRobertaModel", "XLMRobertaConfig", LAYERS | {"bos_token_id": 0, "eos_token_id": 2})
    # The bias alone weighs: 0.5 for every token.
    torch.save({"weight": torch.zeros(1, 32), "bias": torch.tensor([0.5])}, tmp_path / "sparse_linear.pt")
    torch.save({"weight": torch.randn(8, 32), "bias": torch.zeros(8)}, tmp_path / "colbert_linear.pt")
    with LLM(str(tmp_path), max_model_len=8) as llm:
        (output,) = llm.embed_sparse(" ".join(WORDS[:20]), pooling_params=PoolingParams(overflow="chunk"))
        assert output.chunks == 3
        assert output.outputs.as_tokens() == dict.fromkeys(WORDS[:20], 0.5)
