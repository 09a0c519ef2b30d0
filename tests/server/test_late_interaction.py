"""The curls that users of vLLM's ColBERT models and of BGE-M3 know, against `poolhouse serve` on tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from poolhouse import LLM
from tests.models import colbert_layouts, embedding_rows, hub_layout
from tests.models.colbert_layouts import DOCUMENTS, QUERY_LENGTH
from tests.server.running import served

BERT, MODERN, JINA = "answerdotai/answerai-colbert-small-v1", "lightonai/GTE-ModernColBERT-v1", "jinaai/jina-colbert-v2"
M3 = "BAAI/bge-m3"
ROWS = {BERT: "colbert-ir/colbertv2.0, answerdotai/answerai-colbert-small-v1", MODERN: MODERN, JINA: JINA}
DIMENSIONS, M3_DIMENSIONS = 16, 24

QUERY = "What is machine learning?"
TO_RERANK = [
    "Machine learning is a subset of artificial intelligence.",
    "Python is a programming language.",
    "Deep learning uses neural networks.",
]
TO_SCORE = ["Machine learning is a subset of AI.", "The weather is sunny."]
TO_WEIGH = ["What is BGE M3?", "Defination of BM25"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which models lie by their names on the hub."""
    home = tmp_path_factory.mktemp("hub")
    for name, row in ROWS.items():
        colbert_layouts.write(colbert_layouts.ROWS[row], home / name)
    hub_layout.write(embedding_rows.ROWS["BAAI/bge-m3 (dense)"], home / M3, home / "twin-m3")
    hidden = json.loads((home / M3 / "config.json").read_text())["hidden_size"]
    # Weights of about 0.3, most of them above 0.
    sparse = {"weight": 0.1 * torch.randn(1, hidden), "bias": torch.tensor([0.3])}
    torch.save(sparse, home / M3 / "sparse_linear.pt")
    vectors = {"weight": torch.randn(M3_DIMENSIONS, hidden), "bias": torch.randn(M3_DIMENSIONS)}
    torch.save(vectors, home / M3 / "colbert_linear.pt")
    return home


@pytest.fixture(scope="module")
def plain(home: Path) -> Iterator[httpx.Client]:
    """One server of all models, as their files describe them."""
    with served(home, BERT, MODERN, JINA, M3) as client:
        yield client


@pytest.fixture(scope="module")
def modern(home: Path) -> Iterator[httpx.Client]:
    with served(home, MODERN, "--hf-overrides", '{"architectures": ["ColBERTModernBertModel"]}') as client:
        yield client


@pytest.fixture(scope="module")
def jina(home: Path) -> Iterator[httpx.Client]:
    overrides = '{"architectures": ["ColBERTJinaRobertaModel"]}'
    with served(home, JINA, "--hf-overrides", overrides, "--trust-remote-code") as client:
        yield client


@pytest.fixture(scope="module")
def m3(home: Path) -> Iterator[httpx.Client]:
    with served(home, M3, "--hf-overrides", '{"architectures": ["BgeM3EmbeddingModel"]}') as client:
        yield client


@pytest.fixture
def http(request: pytest.FixtureRequest) -> httpx.Client:
    """The server that a test names."""
    client: httpx.Client = request.getfixturevalue(request.param)
    return client


@pytest.fixture
def llm(model: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """The model offline, without options: an override changes nothing."""
    monkeypatch.chdir(home)
    with LLM(model) as llm:
        yield llm


each_colbert = pytest.mark.parametrize(
    ("http", "model"),
    [("plain", BERT), ("plain", MODERN), ("plain", JINA), ("modern", MODERN), ("jina", JINA)],
    indirect=["http"],
)
each_m3 = pytest.mark.parametrize(("http", "model"), [("plain", M3), ("m3", M3)], indirect=["http"])


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    shown: dict[str, Any] = reply.json()
    assert shown["model"] == body["model"]
    return shown


def scores(llm: LLM, documents: Sequence[str]) -> list[float]:
    return [output.outputs.score for output in llm.score(QUERY, documents, use_tqdm=False)]


@each_colbert
def test_rerank_puts_the_best_document_first(http: httpx.Client, model: str, llm: LLM) -> None:
    shown = post(http, "/rerank", model=model, query=QUERY, documents=TO_RERANK)
    assert set(shown) == {"id", "model", "usage", "results"}
    expected = scores(llm, TO_RERANK)
    assert len(set(np.round(expected, 3))) == 3
    assert [result["index"] for result in shown["results"]] == np.argsort(expected)[::-1].tolist()
    for result in shown["results"]:
        assert set(result) == {"index", "document", "relevance_score"}
        assert result["document"] == {"text": TO_RERANK[result["index"]], "multi_modal": None}
        assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-4)


@each_colbert
def test_score_is_the_sum_of_the_best_products(http: httpx.Client, model: str, llm: LLM) -> None:
    shown = post(http, "/score", model=model, text_1=QUERY, text_2=TO_SCORE)
    assert list(shown) == ["id", "object", "created", "model", "data", "usage"]
    assert [(item["index"], item["object"]) for item in shown["data"]] == [(0, "score"), (1, "score")]
    got = [item["score"] for item in shown["data"]]
    assert got == pytest.approx(scores(llm, TO_SCORE), abs=1e-4)
    query, *documents = (
        np.array(
            post(http, "/pooling", model=model, input=text, task="token_embed", input_type=side)["data"][0]["data"]
        )
        for text, side in ((QUERY, "query"), *((text, "document") for text in TO_SCORE))
    )
    assert query.shape == (QUERY_LENGTH, DIMENSIONS)
    assert got == pytest.approx([(query @ document.T).max(axis=1).sum() for document in documents], abs=1e-4)


@each_colbert
def test_pooling_gives_a_vector_per_token(http: httpx.Client, model: str, llm: LLM) -> None:
    shown = post(http, "/pooling", model=model, input=QUERY, task="token_embed")
    assert list(shown) == ["id", "object", "created", "model", "data", "usage"]
    (item,) = shown["data"]
    assert (item["index"], item["object"]) == (0, "pooling")
    (expected,) = llm.encode(QUERY, pooling_task="token_embed", use_tqdm=False)
    # [CLS], the marker, four words and [SEP]; the question mark of what stands as a document has none.
    assert np.shape(item["data"]) == expected.outputs.array.shape == (7, DIMENSIONS)
    assert np.allclose(item["data"], expected.outputs.array, atol=1e-5)
    assert np.allclose(np.linalg.norm(item["data"], axis=1), 1, atol=1e-5)
    assert shown["usage"]["prompt_tokens"] == len(expected.prompt_token_ids) == 8


def test_texts_are_documents_and_tokens_are_counted_as_read(
    plain: httpx.Client, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    with LLM(BERT) as llm:
        expected = llm.encode(DOCUMENTS, pooling_task="token_embed", input_type="document", use_tqdm=False)
    shown = post(plain, "/pooling", model=BERT, input=DOCUMENTS, task="token_embed")
    for item, output in zip(shown["data"], expected, strict=True):
        assert np.allclose(item["data"], output.outputs.array, atol=1e-5)
    # Skipped punctuation was read all the same.
    read = sum(len(output.prompt_token_ids) for output in expected)
    assert shown["usage"]["prompt_tokens"] == read > sum(len(output.outputs.array) for output in expected)


@each_m3
def test_sparse_weights_stand_one_per_token_but_the_first_and_last(http: httpx.Client, model: str, llm: LLM) -> None:
    shown = post(http, "/pooling", model=model, task="token_classify", input=TO_WEIGH)
    expected = llm.encode(TO_WEIGH, pooling_task="token_classify", use_tqdm=False)
    for item, output in zip(shown["data"], expected, strict=True):
        assert item["object"] == "pooling"
        assert np.shape(item["data"]) == (len(output.prompt_token_ids) - 2,)
        assert np.allclose(item["data"], output.outputs.array, atol=1e-5)
        assert max(item["data"]) > 0


@each_m3
def test_multi_vectors_of_bge_m3_have_a_row_per_token_but_the_first(http: httpx.Client, model: str, llm: LLM) -> None:
    shown = post(http, "/pooling", model=model, task="token_embed", input=TO_WEIGH)
    expected = llm.encode(TO_WEIGH, pooling_task="token_embed", use_tqdm=False)
    for item, output in zip(shown["data"], expected, strict=True):
        assert np.shape(item["data"]) == (len(output.prompt_token_ids) - 1, M3_DIMENSIONS)
        assert np.allclose(item["data"], output.outputs.array, atol=1e-5)


@each_m3
def test_dense_sparse_and_multi_vectors_come_at_once_from_one_server(http: httpx.Client, model: str, llm: LLM) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"input": TO_WEIGH}),
        ("/pooling", {"input": TO_WEIGH, "task": "token_classify"}),
        ("/pooling", {"input": TO_WEIGH, "task": "token_embed"}),
    ] * 8
    with ThreadPoolExecutor(len(asked)) as threads:
        shown = list(threads.map(lambda one: post(http, one[0], model=model, **one[1])["data"], asked))
    expected = (
        [output.outputs.array for output in llm.embed(TO_WEIGH, use_tqdm=False)],
        [output.outputs.array for output in llm.encode(TO_WEIGH, pooling_task="token_classify", use_tqdm=False)],
        [output.outputs.array for output in llm.encode(TO_WEIGH, pooling_task="token_embed", use_tqdm=False)],
    )
    for place, items in enumerate(shown):
        for item, array in zip(items, expected[place % 3], strict=True):
            assert np.allclose(item["data" if place % 3 else "embedding"], array, atol=1e-5)
