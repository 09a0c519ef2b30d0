"""Sparse vectors of whole checkpoints, against sentence-transformers' SparseEncoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.sparse_encoder.modules import (
    Router,
    SparseAutoEncoder,
    SparseStaticEmbedding,
    SpladePooling,
)

from poolhouse import LLM, CheckpointError, InvalidRequest, SparseVector, UnsupportedTask
from tests.models.parity import Parity, Record
from tests.models.test_classifiers import ROWS
from tests.models.tiny import LAYERS, TEXTS, WORDS, save, tokenizer

TOLERANCE = 1e-4
# Words that come again weigh once.
QUERY = f"{WORDS[3]} {WORDS[8]} {WORDS[3]} unknown"
SPLADE = {"hf_overrides": {"architectures": ["BertSpladeSparseEmbeddingModel"]}}


def difference(got: Sequence[SparseVector], expected: Any) -> float:
    """The largest difference of a weight, relative to the largest one; the same ids are demanded."""
    dense = expected.to_dense().cpu().numpy()
    for vector, row in zip(got, dense, strict=True):
        assert vector.ids.tolist() == np.flatnonzero(row).tolist()
    errors = [np.abs(vector.weights - row[vector.ids]).max(initial=0) for vector, row in zip(got, dense, strict=True)]
    return float(max(errors) / np.abs(dense).max())


def vectors(llm: LLM, texts: Any, **options: Any) -> list[SparseVector]:
    return [output.outputs for output in llm.embed_sparse(texts, **options)]


def sparse_encoder(plain: Path, row: str, strategy: Any = "max", word: Any = "relu") -> SparseEncoder:
    kind, family, options, _, _ = ROWS[row]
    tokenizer(plain, kind)
    save(plain, f"{family}ForMaskedLM", f"{family}Config", options, std=0.1)
    modules = [Transformer(str(plain), transformer_task="fill-mask"), SpladePooling(strategy, word)]
    return SparseEncoder(modules=modules, device="cpu", similarity_fn_name="dot")


@pytest.mark.parametrize("word", ["relu", "log1p_relu"])
@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("row", ["bert", "distilbert", "roberta", "xlm-roberta"])
def test_ids_and_weights_are_those_of_a_sparse_encoder(row: str, strategy: str, word: str, tmp_path: Path) -> None:
    encoder = sparse_encoder(tmp_path / "plain", row, strategy, word)
    encoder.save_pretrained(str(tmp_path / "described"))
    texts = [*TEXTS, ""]
    with LLM(str(tmp_path / "described")) as llm:
        assert difference(vectors(llm, texts), encoder.encode(texts)) < TOLERANCE
        pruned = encoder.encode(texts, max_active_dims=5)
        assert difference(vectors(llm, texts, top_k=5), pruned) < TOLERANCE


def test_the_largest_entries_that_a_checkpoint_keeps_are_kept_in_every_answer(tmp_path: Path) -> None:
    encoder = sparse_encoder(tmp_path / "plain", "bert")
    encoder.max_active_dims = 7
    encoder.save_pretrained(str(tmp_path / "described"))
    expected = encoder.encode(TEXTS)
    with LLM(str(tmp_path / "described")) as llm:
        assert difference(vectors(llm, TEXTS), expected) < TOLERANCE
        assert np.allclose(llm.embed_array(TEXTS), expected.to_dense().cpu(), atol=TOLERANCE)


def test_weights_are_normalised_where_a_module_says_so(tmp_path: Path) -> None:
    encoder = sparse_encoder(tmp_path / "plain", "bert")
    encoder = SparseEncoder(modules=[*encoder.children(), Normalize()], device="cpu")
    encoder.save_pretrained(str(tmp_path / "described"))
    with LLM(str(tmp_path / "described")) as llm:
        assert difference(vectors(llm, TEXTS), encoder.encode(TEXTS)) < TOLERANCE


def routed(folder: Path, default: str | None = "document", weights: torch.Tensor | None = None) -> SparseEncoder:
    """Queries looked up, documents run."""
    document, pooling = sparse_encoder(folder / "plain", "bert", "max", "log1p_relu").children()
    torch.manual_seed(1)
    static = SparseStaticEmbedding(document.tokenizer, torch.rand(99) if weights is None else weights, frozen=True)
    router = Router.for_query_document([static], [document, pooling], default_route=default)
    prompts = {"query": f"{WORDS[9]} ", "document": ""}
    encoder = SparseEncoder(modules=[router], device="cpu", similarity_fn_name="dot", prompts=prompts)
    encoder.save_pretrained(str(folder / "described"))
    return encoder


def test_a_query_is_looked_up_and_a_document_is_run(tmp_path: Path, record_parity: Record) -> None:
    encoder = routed(tmp_path)
    queries = [QUERY, *TEXTS, ""]
    with LLM(str(tmp_path / "described")) as llm:
        ours, theirs = vectors(llm, queries, input_type="query"), encoder.encode_query(queries)
        error = max(
            difference(ours, theirs),
            difference(vectors(llm, TEXTS, input_type="document"), encoder.encode_document(TEXTS)),
            # Without a role a text takes the default route and no prompt.
            difference(vectors(llm, TEXTS), encoder.encode(TEXTS)),
        )
        assert difference(vectors(llm, TEXTS, prompt_name="query"), encoder.encode_query(TEXTS)) < TOLERANCE
        alone = [vectors(llm, text, input_type="search_document")[0] for text in TEXTS]
        together = vectors(llm, TEXTS, input_type="passage")
        packing = max(
            float(np.abs(one.weights - other.weights).max()) for one, other in zip(alone, together, strict=True)
        )
        # A score tells the sides apart; FlagEmbedding's word for the product of sparse vectors is "sparse".
        scores = [output.outputs.score for output in llm.score(QUERY, TEXTS, mode="sparse")]
        expected = encoder.similarity(encoder.encode_query([QUERY]), encoder.encode_document(TEXTS))[0].tolist()
        assert scores == pytest.approx(expected, abs=TOLERANCE)
        cosine = llm.score(QUERY, TEXTS[0])[0].outputs.score
    dense = [side.to_dense()[0] for side in (encoder.encode_query([QUERY]), encoder.encode_document(TEXTS[:1]))]
    assert cosine == pytest.approx(float(torch.cosine_similarity(*dense, dim=0)), abs=TOLERANCE)
    record_parity(
        Parity(
            "bert, SPLADE with a query side that is looked up",
            "native",
            "SparseEncoder",
            error,
            packing,
            "BertForMaskedLM",
            ("embed", "token_embed"),
            "opensearch-project/opensearch-neural-sparse-encoding-doc-v3-distill",
        )
    )
    assert error < TOLERANCE
    assert packing < TOLERANCE


def test_the_default_route_may_be_the_one_that_is_looked_up(tmp_path: Path) -> None:
    encoder = routed(tmp_path, "query")
    with LLM(str(tmp_path / "described")) as llm:
        assert difference(vectors(llm, TEXTS), encoder.encode(TEXTS)) < TOLERANCE
        with pytest.raises(InvalidRequest, match="looked up, not run"):
            llm.encode(TEXTS, pooling_task="token_embed")
        # Counting tokens counts those that are looked up.
        assert [len(output.prompt_token_ids) for output in llm.embed_sparse(TEXTS)] == [3, 11, 1, 20, 7, 11]


def test_a_query_that_is_too_long_is_refused_or_cut_as_any_other(tmp_path: Path) -> None:
    routed(tmp_path)
    long = " ".join(WORDS) + f" {WORDS[0]}"
    with LLM(str(tmp_path / "described"), max_model_len=64) as llm, pytest.raises(InvalidRequest, match="64"):
        llm.embed_sparse(long, input_type="query")
    with LLM(str(tmp_path / "described"), max_model_len=64, overflow="truncate") as llm:
        (output,) = llm.embed_sparse(long, input_type="query")
        assert output.truncated
        assert len(output.prompt_token_ids) == 64


def change_router(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "router_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_route_mappings_say_which_way_a_text_goes(tmp_path: Path) -> None:
    # As sentence-transformers reads it again, the table has no padding: 94 words of 99 entries.
    routed(tmp_path, weights=torch.rand(94))
    described = tmp_path / "described"
    swapped = {"('query', 'text')": "document", "('document', None)": "query", "(None, 'text')": "query"}
    change_router(described, lambda config: config["parameters"].update(route_mappings=swapped))
    encoder = SparseEncoder(str(described), device="cpu")
    with LLM(str(described)) as llm:
        assert difference(vectors(llm, TEXTS, input_type="query"), encoder.encode_query(TEXTS)) < TOLERANCE
        assert difference(vectors(llm, TEXTS, input_type="document"), encoder.encode_document(TEXTS)) < TOLERANCE
        assert difference(vectors(llm, TEXTS), encoder.encode(TEXTS)) < TOLERANCE


def test_a_text_without_a_route_is_refused(tmp_path: Path) -> None:
    routed(tmp_path)
    described = tmp_path / "described"
    change_router(described, lambda config: config["parameters"].update(default_route=None, allow_empty_key=False))
    with LLM(str(described)) as llm:
        with pytest.raises(InvalidRequest, match=r"no input_type was given, it has \['query', 'document'\]"):
            llm.embed_sparse(TEXTS)
        assert len(llm.embed_sparse(TEXTS, input_type="query")) == len(TEXTS)


def test_a_route_by_the_name_of_the_modality_takes_every_text(tmp_path: Path) -> None:
    document, pooling = sparse_encoder(tmp_path / "plain", "bert").children()
    encoder = SparseEncoder(modules=[Router({"text": [document, pooling]})], device="cpu", similarity_fn_name="dot")
    encoder.save_pretrained(str(tmp_path / "described"))
    with LLM(str(tmp_path / "described")) as llm:
        for role, expected in (("query", encoder.encode_query(TEXTS)), (None, encoder.encode(TEXTS))):
            assert difference(vectors(llm, TEXTS, input_type=role), expected) < TOLERANCE


def test_weights_of_words_in_a_json_file_are_read(tmp_path: Path) -> None:
    weights = torch.zeros(99)
    weights[[7, 12]] = torch.tensor([1.5, 0.25])
    encoder = routed(tmp_path, weights=weights)
    (static,) = (tmp_path / "described").glob("query_0_*")
    (static / "model.safetensors").unlink()
    (static / "config.json").write_text(json.dumps({"path": "idf.json", "frozen": True}))
    (static / "idf.json").write_text(json.dumps({WORDS[3]: 1.5, WORDS[8]: 0.25, "no such word": 3.0}))
    with LLM(str(tmp_path / "described")) as llm:
        ours = vectors(llm, QUERY, input_type="query")
        assert ours[0].as_tokens() == {WORDS[3]: 1.5, WORDS[8]: 0.25}
        assert difference(ours, encoder.encode_query([QUERY])) < TOLERANCE


def test_routes_that_cannot_be_served_are_named(tmp_path: Path) -> None:
    routed(tmp_path)
    described = tmp_path / "described"
    (static,) = described.glob("query_0_*")
    shutil.copytree(described, tmp_path / "two")
    change_router(tmp_path / "two", lambda config: config["structure"].update(query=["document_0_Transformer"]))
    with pytest.raises(CheckpointError, match="served with a SpladePooling behind it alone"):
        LLM(str(tmp_path / "two"))
    shutil.copytree(described, tmp_path / "none")
    change_router(tmp_path / "none", lambda config: config.pop("structure"))
    with pytest.raises(CheckpointError, match="does not describe routes"):
        LLM(str(tmp_path / "none"))
    from safetensors.torch import save_file

    save_file({"weight": torch.rand(100)}, static / "model.safetensors")
    with pytest.raises(CheckpointError, match="has weights of 100 tokens, but the rest of the model knows 99"):
        LLM(str(described))
    save_file({"other": torch.rand(99)}, static / "model.safetensors")
    with pytest.raises(CheckpointError, match="needs a vector `weight`"):
        LLM(str(described))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_sparse_autoencoder_gives_features(normalize: bool, tmp_path: Path, record_parity: Record) -> None:
    plain, described = tmp_path / "plain", tmp_path / "described"
    tokenizer(plain)
    save(plain, "BertModel", "BertConfig", LAYERS)
    torch.manual_seed(2)
    autoencoder = SparseAutoEncoder(32, 64, k=6, k_aux=8, normalize=normalize)
    for parameter in autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder = SparseEncoder(modules=[Transformer(str(plain)), Pooling(32, "mean"), autoencoder], device="cpu")
    encoder.save_pretrained(str(described))
    with LLM(str(described)) as llm:
        got = vectors(llm, TEXTS)
        error = difference(got, encoder.encode(TEXTS))
        assert difference(vectors(llm, TEXTS, top_k=3), encoder.encode(TEXTS, max_active_dims=3)) < TOLERANCE
        alone = [vectors(llm, text)[0] for text in TEXTS]
        with pytest.raises(InvalidRequest, match="features without names"):
            _ = got[0].tokens
        assert llm.embed_sparse_array(TEXTS).shape == (len(TEXTS), 64)
    packing = max(float(np.abs(one.weights - other.weights).max()) for one, other in zip(alone, got, strict=True))
    if not normalize:
        tasks = ("embed", "token_embed")
        row = ("bert, sparse autoencoder", "native", "SparseEncoder", error, packing, "BertModel", tasks)
        record_parity(Parity(*row))
    assert error < TOLERANCE
    assert packing < TOLERANCE


def test_modules_behind_splade_are_refused(tmp_path: Path) -> None:
    encoder = sparse_encoder(tmp_path / "plain", "bert")
    described = tmp_path / "described"
    encoder = SparseEncoder(modules=[*encoder.children(), SparseAutoEncoder(99, 64, k=6, k_aux=8)], device="cpu")
    encoder.save_pretrained(str(described))
    with pytest.raises(CheckpointError, match="modules behind SpladePooling are not served"):
        LLM(str(described))


def test_a_bare_masked_language_model_has_sparse_vectors_where_it_is_called_so(tmp_path: Path) -> None:
    encoder = sparse_encoder(tmp_path, "bert")
    with LLM(str(tmp_path), **SPLADE) as llm:
        assert difference(vectors(llm, TEXTS), encoder.encode(TEXTS)) < TOLERANCE
    with LLM(str(tmp_path)) as llm, pytest.raises(UnsupportedTask, match=r"no sparse vectors.*'token_classify'"):
        llm.embed_sparse(TEXTS)
