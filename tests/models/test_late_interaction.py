"""Late-interaction models, from text to vectors and scores, against sentence-transformers' MultiVectorEncoder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder

from poolhouse import LLM, LateChunkingParams, PoolingParams
from poolhouse.errors import CheckpointError, InvalidRequest, UnsupportedDimensions
from poolhouse.outputs import Array
from tests.models.colbert_layouts import (
    DOCUMENT_LENGTH,
    DOCUMENTS,
    QUERIES,
    QUERY_LENGTH,
    ROWS,
    as_transformers_reads_jina,
    write,
)
from tests.models.parity import Parity, Record, change_config, change_tensors

# Both sides add the same float32 numbers in another order, over at most three layers.
TOLERANCE = 1e-4
BERT = "colbert-ir/colbertv2.0, answerdotai/answerai-colbert-small-v1"
MODERN, JINA = "lightonai/GTE-ModernColBERT-v1", "jinaai/jina-colbert-v2"


def repository(tmp_path: Path, row: str) -> Path:
    """The checkpoint of a row, in a folder named after its first example."""
    folder = tmp_path / re.split(r"[,(]", row, maxsplit=1)[0].strip().rpartition("/")[2]
    write(ROWS[row], folder)
    return folder


def opened(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), dtype="float32", device="cpu", **options)


def vectors(llm: LLM, texts: list[str], side: str | None, params: PoolingParams | None = None) -> list[Array]:
    outputs = llm.encode(texts, params, pooling_task="token_embed", input_type=side, use_tqdm=False)
    return [np.asarray(output.outputs.data) for output in outputs]


def reference(folder: Path, row: str) -> MultiVectorEncoder:
    if row == JINA:
        shutil.copytree(folder, folder.parent / "twin")
        folder = folder.parent / "twin"
        as_transformers_reads_jina(folder)
    return MultiVectorEncoder(str(folder), device="cpu", local_files_only=True)


@pytest.mark.parametrize("row", ROWS)
def test_vectors_and_scores_are_those_of_sentence_transformers(row: str, tmp_path: Path, record_parity: Record) -> None:
    folder = repository(tmp_path, row)
    theirs = reference(folder, row)
    # One text at a time: the reference shall not depend on padding.
    queries = theirs.encode_query(QUERIES, batch_size=1, convert_to_numpy=True)
    documents = theirs.encode_document(DOCUMENTS, batch_size=1, convert_to_numpy=True)
    with opened(folder) as llm:
        assert llm.model.tasks == ("token_embed",)
        ours = {"query": vectors(llm, QUERIES, "query"), "document": vectors(llm, DOCUMENTS, "document")}
        errors, packing = [], []
        for side, texts, expected in (("query", QUERIES, queries), ("document", DOCUMENTS, documents)):
            assert [len(rows) for rows in ours[side]] == [len(rows) for rows in expected]
            errors.append(difference(np.concatenate(ours[side]), np.concatenate(expected)))
            assert cosines(np.concatenate(ours[side]), np.concatenate(expected)).min() > 0.9999
            alone = [vectors(llm, [text], side)[0] for text in texts]
            packing.append(difference(np.concatenate(ours[side]), np.concatenate(alone)))
        assert max(errors) < TOLERANCE
        assert max(packing) < TOLERANCE
        scores = [score.outputs.score for score in llm.score(QUERIES, DOCUMENTS, use_tqdm=False)]
        pairwise = theirs.similarity_pairwise(list(queries), list(documents)).numpy()
        assert np.abs(scores - pairwise).max() < 1e-4
        one = [score.outputs.score for score in llm.score(QUERIES[0], DOCUMENTS, use_tqdm=False)]
        assert np.abs(one - theirs.similarity([queries[0]], list(documents)).numpy()[0]).max() < 1e-4
        record_parity(
            Parity(
                f"late interaction: {row}", llm.model.facts.served_by, "MultiVectorEncoder", max(errors), max(packing),
                architecture=llm.model.facts.architecture, tasks=llm.model.tasks, examples=row if "/" in row else "",
            )
        )  # fmt: skip
    # A model that forgets its text would pass all of the above.
    assert difference(ours["query"][0][2:5], ours["query"][3][2:5]) > 1e-2


def difference(got: Array, expected: Array) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def cosines(got: Array, expected: Array) -> Array:
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    return np.asarray((got * expected).sum(1) / norms)


OVERRIDES = {
    BERT: "HF_ColBERT",
    MODERN: "ColBERTModernBertModel",
    JINA: "ColBERTJinaRobertaModel",
    "LiquidAI/LFM2-ColBERT-350M": "ColBERTLfm2Model",
}


@pytest.mark.parametrize(("row", "architecture"), OVERRIDES.items())
def test_an_architecture_by_override_changes_nothing(row: str, architecture: str, tmp_path: Path) -> None:
    folder = repository(tmp_path, row)
    with opened(folder) as plain, opened(folder, hf_overrides={"architectures": [architecture]}) as named:
        for side in ("query", "document"):
            for one, other in zip(vectors(plain, QUERIES, side), vectors(named, QUERIES, side), strict=True):
                assert np.array_equal(one, other)


def test_transformers_gives_the_same_vectors(tmp_path: Path) -> None:
    """Mask tokens that nobody attends to, in transformers' own attention and in ours."""
    folder = repository(tmp_path, BERT)
    with opened(folder) as native, opened(folder, model_impl="transformers") as other:
        assert other.model.facts.served_by.startswith("transformers, packed")
        assert not any("linear.weight" in note for note in (*native.model.facts.notes, *other.model.facts.notes))
        for side in ("query", "document"):
            got, expected = (np.concatenate(vectors(llm, QUERIES, side)) for llm in (native, other))
            assert difference(got, expected) < TOLERANCE


def test_tokens_are_those_of_colbert(tmp_path: Path) -> None:
    """Stanford's own rules: [CLS], the marker, the text, [SEP], and mask tokens up to the length of queries."""
    with opened(repository(tmp_path, BERT)) as llm:

        def read(text: str, side: str | None) -> tuple[list[str], int, bool]:
            (output,) = llm.encode(text, pooling_task="token_embed", input_type=side, use_tqdm=False)
            return llm.engine.token_strings(output.prompt_token_ids), len(output.outputs.data), output.truncated

        query = ["[CLS]", "[unused0]", "who", "?", "[SEP]"]
        assert read("who?", "query") == (query + ["[MASK]"] * (QUERY_LENGTH - len(query)), QUERY_LENGTH, False)
        # Punctuation is read, but gets no vector.
        document = ["[CLS]", "[unused1]", "who", "?", "[SEP]"]
        assert read("who?", "document") == (document, 4, False)
        assert read("who?", None) == read("who?", "search_document") == read("who?", "document")
        long = read("who? " * 30, "query")
        assert long == ([*query[:2], *["who", "?"] * 5, "who", "[SEP]"], QUERY_LENGTH, True)
        tokens, rows, truncated = read("who? " * 30, "document")
        assert (len(tokens), tokens[-1], rows, truncated) == (DOCUMENT_LENGTH, "[SEP]", 3 + 11, True)


def test_requests_of_one_pack_may_ask_for_different_vectors(tmp_path: Path) -> None:
    with opened(repository(tmp_path, BERT)) as llm:
        unit, raw = (PoolingParams(use_activation=wanted) for wanted in (True, False))
        outputs = llm.encode(DOCUMENTS, [unit, raw] * 3, pooling_task="token_embed", use_tqdm=False)
        expected = vectors(llm, DOCUMENTS, "document")
        for output, rows in zip(outputs, expected, strict=True):
            got = output.outputs.array
            assert np.abs(got / np.linalg.norm(got, axis=1, keepdims=True) - rows).max() < 1e-5
        assert np.abs(outputs[1].outputs.array - expected[1]).max() > 1e-2


def test_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    with opened(repository(tmp_path, BERT)) as llm:
        ids = [2, 9, 12, 60, 3]
        (output,) = llm.encode({"prompt_token_ids": ids}, pooling_task="token_embed", input_type="query")
        assert output.prompt_token_ids == ids
        assert len(output.outputs.data) == len(ids)


@pytest.mark.parametrize("row", [BERT, MODERN, "MultiVectorEncoder, fixed"])
def test_compatible_with_vllm_both_sides_are_plain_texts(row: str, tmp_path: Path) -> None:
    folder = repository(tmp_path, row)
    with opened(folder, colbert_compat="vllm") as llm:
        sides = [vectors(llm, DOCUMENTS, side) for side in (None, "query", "document")]
        tokens = [llm.engine.tokenizer.special_tokens]
        for plain, *others in zip(*sides, strict=True):
            assert all(np.array_equal(plain, other) for other in others)
        (output,) = llm.encode("who?", pooling_task="token_embed", use_tqdm=False)
        assert tokens == [2]
        assert len(output.prompt_token_ids) == len(output.outputs.data) == 4
        score = llm.score("who?", "one, two", use_tqdm=False)[0].outputs.score
        query, document = (vectors(llm, [text], None)[0] for text in ("who?", "one, two"))
        assert score == pytest.approx((query @ document.T).max(1).sum(), abs=1e-5)


def test_a_shorter_limit_of_the_caller_holds(tmp_path: Path) -> None:
    with opened(repository(tmp_path, BERT)) as llm:
        (document,) = llm.encode(
            "who " * 9,
            PoolingParams(truncate_prompt_tokens=6),
            pooling_task="token_embed",
            use_tqdm=False,
        )
        assert llm.engine.token_strings(document.prompt_token_ids) == ["[CLS]", "[unused1]", *["who"] * 3, "[SEP]"]
        assert document.truncated
        with pytest.raises(InvalidRequest, match="greater than max_model_len"):
            vectors(llm, ["who"], "document", PoolingParams(truncate_prompt_tokens=1000))
    with opened(repository(tmp_path / "short", BERT), max_model_len=8) as llm:
        assert len(vectors(llm, ["who"], "query")[0]) == 8
        assert len(vectors(llm, ["who " * 30], "document")[0]) == 8


def test_late_chunking_needs_texts_read_as_vllm_reads_them(tmp_path: Path) -> None:
    folder = repository(tmp_path, BERT)
    params = PoolingParams(late_chunking_params=LateChunkingParams(chunk_size=2))
    with opened(folder) as llm, pytest.raises(InvalidRequest, match="load it with colbert_compat='vllm'"):
        llm.encode("two words", params, pooling_task="token_embed")
    with opened(folder, colbert_compat="vllm") as llm:
        (output,) = llm.embed("two words", pooling_params=params)
        assert len(output.outputs.array) == len(output.late_chunking.chunks) == (len(output.prompt_token_ids) + 1) // 2


def test_dimensions_need_matryoshka(tmp_path: Path) -> None:
    folder = repository(tmp_path, BERT)
    with opened(folder) as llm, pytest.raises(UnsupportedDimensions, match="does not support matryoshka"):
        vectors(llm, QUERIES, "query", PoolingParams(dimensions=8))
    with opened(folder, matryoshka_dimensions=(8, 16)) as llm:
        whole, cut = (vectors(llm, ["who"], "query", PoolingParams(dimensions=size))[0] for size in (None, 8))
        # Cut first, then brought to unit length.
        assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)
        assert np.abs(whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True) - cut).max() < 1e-5


def test_matryoshka_sizes_are_read_from_files_and_the_model_card(tmp_path: Path) -> None:
    folder = repository(tmp_path, MODERN)
    words = json.loads((folder / "config_sentence_transformers.json").read_text())
    (folder / "config_sentence_transformers.json").write_text(json.dumps(words | {"matryoshka_dims": [8, 16]}))
    with opened(folder) as llm:
        assert vectors(llm, ["who"], "query", PoolingParams(dimensions=8))[0].shape[1] == 8
    folder = repository(tmp_path, JINA)
    change_tensors(folder, add={"linear.weight": torch.randn(128, 32)})
    metadata = json.loads((folder / "artifact.metadata").read_text())
    (folder / "artifact.metadata").write_text(json.dumps(metadata | {"dim": 128}))
    with opened(folder) as llm:
        assert vectors(llm, ["who"], "query", PoolingParams(dimensions=64))[0].shape[1] == 64
        with pytest.raises(UnsupportedDimensions, match=r"only supports \[64, 96, 128\]"):
            vectors(llm, ["who"], "query", PoolingParams(dimensions=65))


def test_a_document_of_punctuation_alone_has_no_vectors_and_scores_nothing(tmp_path: Path) -> None:
    """Without special tokens and markers nothing is left of it; sentence-transformers answers an empty matrix too."""
    folder = repository(tmp_path, "PyLate, no markers")
    native = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(native | {"post_processor": None}))
    expected = MultiVectorEncoder(str(folder), device="cpu").encode_document(["?!", "a"], convert_to_numpy=True)
    with opened(folder) as llm:
        got = vectors(llm, ["?!", "a"], "document")
        assert [rows.shape[0] for rows in got] == [rows.shape[0] for rows in expected] == [0, 1]
        scores = [output.outputs.score for output in llm.score("a b", ["?!", "a"], use_tqdm=False)]
        assert scores[0] == 0
        assert scores[1] != 0
        with pytest.raises(InvalidRequest, match="no tokens"):
            vectors(llm, [""], "document")
        # A query of nothing but mask tokens lets them attend to each other.
        assert np.isfinite(vectors(llm, ["?"], "query")[0]).all()


def drop_projection(folder: Path) -> None:
    change_tensors(folder, drop="linear.weight")


def widen_projection(folder: Path) -> None:
    change_tensors(folder, add={"linear.weight": torch.randn(16, 33)})


def shorten_projection(folder: Path) -> None:
    change_tensors(folder, add={"linear.weight": torch.randn(8, 32)})


def forget_marker(folder: Path) -> None:
    metadata = json.loads((folder / "artifact.metadata").read_text())
    (folder / "artifact.metadata").write_text(json.dumps(metadata | {"doc_token_id": "[unused9]"}))


def measure_otherwise(folder: Path) -> None:
    metadata = json.loads((folder / "artifact.metadata").read_text())
    (folder / "artifact.metadata").write_text(json.dumps(metadata | {"similarity": "l2"}))


def spoil_metadata(folder: Path) -> None:
    (folder / "artifact.metadata").write_text("{")


def widen_dense(folder: Path) -> None:
    save_file({"linear.weight": torch.randn(16, 33)}, folder / "1_Dense" / "model.safetensors")
    config = json.loads((folder / "1_Dense" / "config.json").read_text())
    (folder / "1_Dense" / "config.json").write_text(json.dumps(config | {"in_features": 33}))


def drop_dense(folder: Path) -> None:
    (folder / "modules.json").write_text(json.dumps(json.loads((folder / "modules.json").read_text())[:1]))


def forget_modules(folder: Path) -> None:
    (folder / "modules.json").unlink()
    change_config(folder, architectures=["ColBERTModernBertModel"])


@pytest.mark.parametrize(
    ("row", "spoil", "message"),
    [
        (BERT, drop_projection, "no projection, which HF_ColBERT needs; it is never made up. Looked for linear.weight"),
        (BERT, widen_projection, "takes 33 features, but 32 come in"),
        (BERT, shorten_projection, r"linear.weight is \[8, 32\], but its files state vectors of 16"),
        (BERT, forget_marker, r"marked by the token '\[unused9\]', which its tokenizer does not have"),
        (BERT, measure_otherwise, "similarity 'l2' is not supported"),
        (BERT, spoil_metadata, "artifact.metadata cannot be read as JSON"),
        (MODERN, widen_dense, "A Dense module takes 33 features, but 32 come in"),
        (MODERN, drop_dense, "names no Dense module, the projection that late interaction needs"),
        (MODERN, forget_modules, "no projection, which ColBERTModernBertModel needs"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_with_the_reason(row: str, spoil: Any, message: str, tmp_path: Path) -> None:
    folder = repository(tmp_path, row)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        opened(folder)


def test_a_checkpoint_without_metadata_has_the_rules_of_colbert(tmp_path: Path) -> None:
    folder = repository(tmp_path, BERT)
    (folder / "artifact.metadata").unlink()
    with opened(folder) as llm:
        assert len(vectors(llm, ["who?"], "query")[0]) == 32
        assert len(vectors(llm, ["who?"], "document")[0]) == 4


def test_names_of_the_backbone_may_stand_without_a_prefix(tmp_path: Path) -> None:
    folder = repository(tmp_path, BERT)
    with opened(folder) as llm:
        expected = vectors(llm, QUERIES, "query")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("bert."): tensor for name, tensor in tensors.items() if name != "linear.weight"}
    save_file(renamed | {"colbert_linear.weight": tensors["linear.weight"]}, folder / "model.safetensors")
    with opened(folder) as llm:
        assert all(map(np.array_equal, vectors(llm, QUERIES, "query"), expected))
