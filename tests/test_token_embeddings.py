"""Token vectors as packed matrices and files, and token pooling."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

from poolhouse import LLM, ConfigError, InputTooLong, InvalidRequest, TokenEmbeddings, UnsupportedTask
from poolhouse.engine.request import Request
from poolhouse.outputs import Array
from poolhouse.vectors.max_sim import max_sim
from poolhouse.vectors.precision import PRECISIONS, Calibration, Precision, dequantize, quantize
from poolhouse.vectors.token_pooling import pooled
from tests.checkpoints import save_checkpoint
from tests.test_max_sim import texts as matrices
from tests.test_max_sim import unit_rows

TEXTS = ["the moon pulls the sea", "yeast", "there are tides, and there is bread", "the sea"]
SUFFIXES = [".npz", ".safetensors", ".arrow"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


def rows_of(llm: LLM, prompts: list[str]) -> list[Array]:
    return [output.outputs.array for output in llm.encode(prompts, pooling_task="token_embed")]


def test_embed_tokens_packs_what_encode_gives(llm: LLM) -> None:
    embedded = llm.embed_tokens(TEXTS)
    assert (len(embedded), embedded.values.shape[1], embedded.precision) == (4, 384, "float32")
    for ours, theirs in zip(embedded, rows_of(llm, TEXTS), strict=True):
        assert ours.base is embedded.values
        assert np.allclose(ours, theirs, atol=1e-6)
    assert np.array_equal(embedded[-1], embedded[3])
    with pytest.raises(IndexError, match="There are 4 texts, and no text 4"):
        embedded[4]
    assert "4 texts" in repr(embedded)
    twin = asyncio.run(llm.embed_tokens_async(TEXTS))
    assert np.allclose(twin.values, embedded.values, atol=1e-6)
    assert np.array_equal(twin.offsets, embedded.offsets)


def test_token_embeddings_score_queries_as_the_model_does(llm: LLM) -> None:
    query = rows_of(llm, ["what moves the sea?"])[0]
    expected = max_sim(query, rows_of(llm, TEXTS))
    assert llm.embed_tokens(TEXTS).max_sim(query) == pytest.approx(expected, abs=1e-4)
    # Sums of 8 products of unit vectors, each of 11 bits.
    assert llm.embed_tokens(TEXTS, precision="float16").max_sim(query) == pytest.approx(expected, abs=8 * 2**-11)
    codes = llm.embed_tokens(TEXTS, precision="int8")
    floats = [dequantize(rows, "int8") for rows in codes]
    assert codes.max_sim(query) == pytest.approx(max_sim(query, floats), abs=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_are_quantized_as_by_themselves(llm: LLM, precision: Precision) -> None:
    embedded = llm.embed_tokens(TEXTS, precision=precision)
    alone = llm.embed_tokens(TEXTS)
    assert np.array_equal(embedded.offsets, alone.offsets)
    assert embedded.values.dtype == quantize(alone.values, precision).dtype
    # Two runs differ in their last digits, which may move a code by one step; bits of values near 0 may flip.
    theirs = dequantize(quantize(alone.values, precision), precision)
    assert np.mean(embedded.floats() != theirs) < 1e-3


def test_blocks_hold_all_prompts_in_order(llm: LLM) -> None:
    prompts = TEXTS * 5
    blocks = list(llm.embed_tokens_in_blocks(iter(prompts), prompts_per_block=6))
    assert [len(block) for block in blocks] == [6, 6, 6, 2]
    whole, joined = llm.embed_tokens(prompts), TokenEmbeddings.joined(blocks)
    assert np.array_equal(joined.offsets, whole.offsets)
    assert np.allclose(joined.values, whole.values, atol=1e-6)
    assert list(llm.embed_tokens_in_blocks([])) == []


def test_a_corpus_is_read_one_block_ahead(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    submitted: list[Request] = []
    submit = llm.engine.submit

    def noted(requests: list[Request], *how: Any) -> Any:
        submitted.extend(requests)
        return submit(requests, *how)

    def corpus() -> Iterator[str]:
        for number in range(100):
            read.append(number)
            yield f"text {number}"

    monkeypatch.setattr(llm.engine, "submit", noted)
    blocks = llm.embed_tokens_in_blocks(corpus(), prompts_per_block=10)
    assert not read
    next(blocks)
    assert len(read) == 20
    next(blocks)
    assert len(read) == 30
    blocks.close()  # type: ignore[attr-defined]
    assert len(submitted) == 30
    assert all(request.future.done() or request.future.cancelled() for request in submitted[:20])
    later = [request.future for request in submitted[20:]]
    assert all(future.cancelled() or future.result(30) is not None for future in later)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token_pooling_factor": 0.5}, "token_pooling_factor must be a number from 1, got 0.5"),
        ({"token_pooling_factor": True}, "must be a number from 1, got True"),
        ({"token_pooling_factor": 2, "input_type": "query"}, "is for documents: a query keeps"),
        ({"precision": "int4"}, "precision='int4' is not one of"),
        ({"input_type": "picture"}, "Unsupported input_type 'picture'"),
        ({"prompt_name": "sonnet"}, "no prompt named 'sonnet'"),
    ],
)
def test_wrong_options_are_named(llm: LLM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        llm.embed_tokens(TEXTS, **options)
    with pytest.raises(InvalidRequest, match=words):
        list(llm.embed_tokens_in_blocks(TEXTS, **options))


def test_a_block_with_a_wrong_prompt_raises_and_others_come(llm: LLM) -> None:
    blocks = llm.embed_tokens_in_blocks(["one", "two", "word " * 600, "four"], prompts_per_block=2)
    assert len(next(blocks)) == 2
    with pytest.raises(InputTooLong):
        next(blocks)
    with pytest.raises(InvalidRequest, match="takes prompts one by one"):
        llm.embed_tokens_in_blocks("a text")
    with pytest.raises(InvalidRequest, match="got list and 0"):
        llm.embed_tokens_in_blocks(["a"], prompts_per_block=0)


def test_a_classifier_has_no_token_vectors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece", "ForSequenceClassification")
    with LLM(str(tmp_path)) as classifier, pytest.raises(UnsupportedTask, match="token_embed"):
        classifier.embed_tokens("a")


def test_pooled_tokens_are_fewer_and_packed(llm: LLM) -> None:
    whole, fewer = llm.embed_tokens(TEXTS), llm.embed_tokens(TEXTS, token_pooling_factor=2)
    assert np.diff(whole.offsets).tolist() == [7, 3, 10, 4]
    assert np.diff(fewer.offsets).tolist() == [1 + 3, 1 + 1, 1 + 4, 1 + 1]
    for ours, vectors in zip(fewer, whole, strict=True):
        assert np.allclose(ours, pooled(vectors, 2), atol=1e-5)
    assert np.allclose(np.linalg.norm(fewer.values, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("protected", [0, 1, 3])
@pytest.mark.parametrize("normalize", [True, False])
@given(rows=st.integers(0, 40), factor=st.sampled_from([1, 1.0, 1.5, 2, 3, 7, 100]), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_pooling_is_that_of_sentence_transformers(
    protected: int, normalize: bool, rows: int, factor: float, seed: int
) -> None:
    vectors = unit_rows(rows, 16, seed)
    if rows > 6:
        # Equal vectors are joined before all others.
        vectors[5] = vectors[2]
    theirs = HierarchicalTokenPooling(factor, num_protected_tokens=protected, normalize_embeddings=normalize)
    expected = theirs.pool([torch.from_numpy(vectors.copy())])[0].numpy()
    ours = pooled(vectors, factor, protected=protected, normalize=normalize)
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    assert np.allclose(ours, expected, atol=1e-6)


def test_equal_vectors_are_one_cluster() -> None:
    vectors = np.tile(unit_rows(1, 8, 0), (9, 1))
    assert pooled(vectors, 2).shape == (2, 8)
    assert np.allclose(pooled(vectors, 2), vectors[:2], atol=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stored", [False, True], ids=["fixed", "calibrated"])
def test_files_give_back_what_was_written(tmp_path: Path, suffix: str, precision: Precision, stored: bool) -> None:
    vectors = matrices([3, 0, 5, 1], 16)
    calibration = Calibration.of(np.concatenate(vectors)) if stored else None
    written = TokenEmbeddings.of(vectors, precision, calibration)
    written.save(tmp_path / f"vectors{suffix}")
    read = TokenEmbeddings.load(tmp_path / f"vectors{suffix}")
    assert read.precision == precision
    assert read.values.dtype == written.values.dtype
    assert np.array_equal(read.values, written.values)
    assert np.array_equal(read.offsets, written.offsets)
    assert np.array_equal(read.floats(), written.floats())
    assert [path.name for path in tmp_path.iterdir()] == [f"vectors{suffix}"]


def test_other_libraries_read_the_files(tmp_path: Path) -> None:
    import pyarrow
    from safetensors.numpy import load_file

    written = TokenEmbeddings.of(matrices([3, 0, 2], 4), "float16")
    for suffix in SUFFIXES:
        written.save(tmp_path / f"vectors{suffix}")
    assert np.array_equal(np.load(tmp_path / "vectors.npz")["values"], written.values)
    assert np.array_equal(load_file(tmp_path / "vectors.safetensors")["offsets"], written.offsets)
    table = pyarrow.ipc.open_file(tmp_path / "vectors.arrow").read_all()
    assert table.schema.field("vectors").type == pyarrow.list_(pyarrow.list_(pyarrow.float16(), 4))
    assert table.schema.metadata == {b"precision": b"float16"}
    assert table["vectors"].to_pylist() == [rows.tolist() for rows in written]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_such_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"vectors{suffix}"
    with pytest.raises(ConfigError, match="cannot be read as token vectors"):
        TokenEmbeddings.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="cannot be read as token vectors"):
        TokenEmbeddings.load(path)
    with pytest.raises(ConfigError, match=r"files that end with \.npz, \.safetensors, \.arrow"):
        TokenEmbeddings.load(tmp_path / "vectors.csv")


def test_files_of_other_contents_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", numbers=np.ones(3))
    np.savez(tmp_path / "b.npz", values=np.ones((3, 2)), offsets=np.array([0, 4]), precision=np.array("float32"))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ConfigError, match=f"{name} cannot be read as token vectors"):
            TokenEmbeddings.load(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    from poolhouse.vectors import token_embeddings

    path = tmp_path / "vectors.arrow"
    path.write_text("old")

    def fail_later() -> None:
        with token_embeddings.writer(path) as write:
            write(TokenEmbeddings.of(matrices([2], 4)))
            raise KeyError

    with pytest.raises(KeyError):
        fail_later()
    assert path.read_text() == "old"
    assert [left.name for left in tmp_path.iterdir()] == ["vectors.arrow"]


@pytest.mark.parametrize(
    ("missing", "extra", "call"),
    [
        ("scipy", "token-pooling", lambda _: pooled(unit_rows(9, 4, 0), 2)),
        ("pyarrow", "arrow", lambda folder: TokenEmbeddings.of(matrices([2], 4)).save(folder / "a.arrow")),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(
    missing: str, extra: str, call: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == missing:
            raise ImportError(name)
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("poolhouse.files.import_module", without)
    with pytest.raises(ConfigError, match=rf"{missing}, which.* is not installed: pip install 'poolhouse\[{extra}\]'"):
        call(tmp_path)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], []])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    with pytest.raises(InvalidRequest):
        TokenEmbeddings(unit_rows(3, 2, 0), np.array(offsets, np.int64))
