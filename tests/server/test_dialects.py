"""Every dialect's bodies: what is asked, the exact fields of what comes back, and its way to say no."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.documented import checked
from tests.server.exchanges import masked

QUERY = "why are there tides"
DOCUMENTS = ["yeast makes bread rise", "the moon pulls the sea towards it", "tides follow the moon"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(matryoshka_dimensions=(64, 128)) as llm:
        yield llm


@pytest.fixture(scope="module")
def http(llm: LLM) -> Iterator[TestClient]:
    with TestClient(create_app([llm.engine])) as client:
        checked(client)
        yield client


@pytest.fixture(scope="module")
def order(llm: LLM) -> list[int]:
    scores = [output.outputs.score for output in llm.score(QUERY, DOCUMENTS)]
    return sorted(range(len(scores)), key=lambda place: -scores[place])


@pytest.fixture
def labelled() -> Iterator[TestClient]:
    engine = FakeEngine("labels", tasks=("classify",), label_names={0: "calm", 1: "angry", 2: "glad"}, max_tokens=9)
    with TestClient(create_app([engine])) as client:
        checked(client)
        yield client


RERANK = {"query": QUERY, "documents": DOCUMENTS}


@pytest.mark.parametrize(
    ("path", "body", "fields", "results", "item"),
    [
        ("/cohere/v1/rerank", RERANK, {"id", "results", "meta"}, "results", {"index", "relevance_score"}),
        ("/cohere/v1/rerank", {**RERANK, "return_documents": True}, {"id", "results", "meta"}, "results", {"index", "relevance_score", "document"}),
        ("/cohere/v2/rerank", {**RERANK, "model": "all-MiniLM-L6-v2"}, {"id", "results", "meta"}, "results", {"index", "relevance_score"}),
        ("/jina/v1/rerank", RERANK, {"model", "object", "usage", "results"}, "results", {"index", "relevance_score", "document"}),
        ("/jina/v1/rerank", {**RERANK, "return_documents": False}, {"model", "object", "usage", "results"}, "results", {"index", "relevance_score"}),
        ("/voyage/v1/rerank", RERANK, {"object", "data", "model", "usage"}, "data", {"index", "relevance_score"}),
        ("/v1/rerank", {**RERANK, "top_k": 3, "return_documents": True}, {"object", "data", "model", "usage"}, "data", {"index", "relevance_score", "document"}),
        ("/infinity/rerank", RERANK, {"object", "results", "model", "usage", "id", "created"}, "results", {"index", "relevance_score", "document"}),
        ("/v1/rerank", RERANK, {"id", "model", "usage", "results"}, "results", {"index", "relevance_score", "document"}),
        ("/v1/rerank", {**RERANK, "max_chunks_per_doc": 10}, {"id", "results", "meta"}, "results", {"index", "relevance_score"}),
        ("/v2/rerank", RERANK, {"id", "model", "usage", "results", "meta"}, "results", {"index", "relevance_score", "document"}),
    ],
)  # fmt: skip
def test_a_rerank_has_the_fields_of_its_dialect(
    http: TestClient, order: list[int], path: str, body: dict[str, Any], fields: set[str], results: str, item: set[str]
) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert set(reply.json()) == fields
    assert [result["index"] for result in reply.json()[results]] == order
    assert all(set(result) == item for result in reply.json()[results])


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/cohere/v2/rerank", "top_n"), ("/jina/v1/rerank", "top_n"), ("/voyage/v1/rerank", "top_k"), ("/infinity/rerank", "top_n")],
)  # fmt: skip
def test_the_best_few_can_be_asked_for(http: TestClient, order: list[int], path: str, limit: str) -> None:
    body = http.post(path, json={**RERANK, limit: 2}).json()
    results = body.get("results", body.get("data"))
    assert [result["index"] for result in results] == order[:2]


def test_documents_are_echoed_as_each_dialect_does(http: TestClient, order: list[int]) -> None:
    best = DOCUMENTS[order[0]]
    asked = {**RERANK, "return_documents": True}
    assert http.post("/cohere/v1/rerank", json=asked).json()["results"][0]["document"] == {"text": best}
    assert http.post("/jina/v1/rerank", json=asked).json()["results"][0]["document"] == {"text": best}
    assert http.post("/voyage/v1/rerank", json=asked).json()["data"][0]["document"] == best
    assert http.post("/infinity/rerank", json=asked).json()["results"][0]["document"] == best
    assert http.post("/infinity/rerank", json=RERANK).json()["results"][0]["document"] is None


def test_cohere_hears_what_a_rerank_cost(http: TestClient) -> None:
    many = {"query": "q", "documents": ["a"] * 101}
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 2}}
    assert [http.post(path, json=many).json()["meta"] for path in ("/v2/rerank", "/cohere/v2/rerank")] == [meta, meta]
    cut = http.post("/v2/rerank", json={"query": "q", "documents": ["a b c"], "max_tokens_per_doc": 2}).json()
    assert cut["meta"]["warnings"] == ["1 of 2 inputs were longer than the limit, and cut."]


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/embeddings", "dimensions", {"input": "a"}),
        ("/v1/embeddings", "output_dimension", {"input": "a", "late_chunking": True}),
        ("/pooling", "dimensions", {"input": "a", "task": "embed"}),
        ("/pooling", "dimensions", {"input": "a", "task": "token_embed"}),
        ("/pooling", "dimensions", {"input": "a", "tasks": ["embed", "token_embed"]}),
        ("/invocations", "dimensions", {"input": "a"}),
        ("/embed", "dimensions", {"inputs": "a"}),
        ("/tei/v1/embeddings", "dimensions", {"input": "a"}),
        ("/v1/embed", "output_dimension", {"texts": ["a"]}),
        ("/v2/embed", "output_dimension", {"texts": ["a"], "embedding_types": ["ubinary"]}),
        ("/jina/v1/embeddings", "dimensions", {"input": "a"}),
        ("/jina/v1/embeddings", "dimensions", {"input": "a", "return_multivector": True}),
        ("/v1/multi-vector", "dimensions", {"input": "a"}),
        ("/voyage/v1/embeddings", "output_dimension", {"input": "a"}),
        ("/infinity/embeddings", "dimensions", {"input": "a"}),
    ],
)
@pytest.mark.parametrize("sizes", [(), (16,)])
def test_the_models_own_width_is_taken_by_every_dialect(
    path: str, field: str, body: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    with TestClient(create_app([FakeEngine(width=32, dimensions=sizes)])) as http:
        plain, whole, other = (http.post(path, json={**body, **more}) for more in ({}, {field: 32}, {field: 24}))
        assert (plain.status_code, whole.status_code, masked(whole.json())) == (200, 200, masked(plain.json()))
        assert other.status_code in (400, 422)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/cohere/v1/rerank", "/cohere/v2/rerank"])
@pytest.mark.parametrize("limit", [512, 4096, 2**62])
def test_a_limit_that_no_document_reaches_is_the_models(http: TestClient, path: str, limit: int) -> None:
    # Of its two fields alone the reply has Weaviate's form too.
    plain = http.post(path, json={**RERANK, "top_n": 3}).json()
    reply = http.post(path, json={**RERANK, "max_tokens_per_doc": limit})
    assert reply.status_code == 200
    assert masked(reply.json()) == masked(plain)
    # What is longer is cut, as Cohere does, and said to be.
    long = {"query": QUERY, "documents": ["w " * 999, "short"], "max_tokens_per_doc": limit}
    reply = http.post(path, json=long)
    assert (reply.status_code, reply.headers["x-poolhouse-truncated"]) == (200, "1")


def test_a_path_that_others_share_knows_cohere_by_its_own_fields(http: TestClient) -> None:
    documents = [{"title": "tides"}, {"title": "bread"}]
    body = {"query": "tides", "documents": documents, "rank_fields": ["title"], "top_n": 1, "return_documents": True}
    exact = http.post("/cohere/v1/rerank", json=body).json()
    for path in ("/v1/rerank", "/rerank"):
        assert {**http.post(path, json=body).json(), "id": exact["id"]} == exact
        wrong = http.post(path, json={**body, "top_n": 0})
        assert (wrong.status_code, set(wrong.json())) == (400, {"message"})


def test_cohere_cuts_at_the_model_where_more_tokens_are_allowed(http: TestClient) -> None:
    texts = ["word " * 400]
    asked, plain = (http.post("/v2/embed", json={"texts": texts, **more}) for more in ({"max_tokens": 5000}, {}))
    assert (asked.status_code, asked.headers["x-poolhouse-truncated"]) == (200, "1")
    assert asked.json()["embeddings"] == plain.json()["embeddings"]


def test_cohere_reads_fields_of_documents(http: TestClient, order: list[int]) -> None:
    documents = [{"title": "about", "body": text, "id": "7"} for text in DOCUMENTS]
    body = {"query": QUERY, "documents": documents, "rank_fields": ["body"], "return_documents": True}
    results = http.post("/cohere/v1/rerank", json=body).json()["results"]
    assert [result["index"] for result in results] == order
    assert results[0]["document"] == documents[order[0]]
    missing = http.post("/cohere/v1/rerank", json={**body, "rank_fields": ["text"]})
    assert (missing.status_code, missing.json()) == (400, {"message": "documents[0] has no text 'text'."})


def test_cohere_embeds_by_type(http: TestClient, llm: LLM) -> None:
    expected = llm.embed_array(DOCUMENTS)
    body = {"model": "all-MiniLM-L6-v2", "texts": DOCUMENTS, "input_type": "search_document"}
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    reply = http.post("/v2/embed", json={**body, "embedding_types": kinds}).json()
    assert set(reply) == {"id", "embeddings", "texts", "meta", "response_type"}
    assert reply["response_type"] == "embeddings_by_type"
    assert reply["texts"] == DOCUMENTS
    assert reply["meta"]["api_version"] == {"version": "2"}
    assert reply["meta"]["billed_units"]["input_tokens"] > 0
    made = reply["embeddings"]
    assert list(made) == kinds
    assert np.allclose(made["float"], expected, atol=1e-6)
    bits = np.packbits(expected >= 0, axis=1)
    assert np.array_equal(made["ubinary"], bits)
    assert np.array_equal(made["binary"], bits.astype(int) - 128)
    assert np.array_equal(np.array(made["uint8"]) - 128, made["int8"])
    assert np.allclose(np.frombuffer(base64.b64decode(made["base64"][0]), "<f4"), expected[0], atol=1e-6)
    assert list(http.post("/v2/embed", json=body).json()["embeddings"]) == ["float"]
    short = http.post("/v2/embed", json={**body, "output_dimension": 64}).json()["embeddings"]["float"]
    assert np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)
    assert np.array(short).shape == (3, 64)
    first = http.post("/v1/embed", json=body).json()
    assert first["response_type"] == "embeddings_floats"
    assert np.allclose(first["embeddings"], expected, atol=1e-6)
    parts = [{"content": [{"type": "text", "text": text}]} for text in DOCUMENTS]
    by_parts = http.post("/v2/embed", json={"inputs": parts, "input_type": "search_document"}).json()
    assert np.allclose(by_parts["embeddings"]["float"], expected, atol=1e-6)


def test_what_cohere_cuts_it_says(http: TestClient) -> None:
    body = {"texts": ["short", "word " * 999], "input_type": "search_document"}
    reply = http.post("/v2/embed", json=body)
    assert reply.json()["meta"]["warnings"] == ["1 of 2 inputs were longer than the limit, and cut."]
    assert reply.headers["x-poolhouse-truncated"] == "1"
    refused = http.post("/v2/embed", json={**body, "truncate": "NONE"})
    assert refused.status_code == 400
    assert set(refused.json()) == {"message"}
    assert "texts[1]" in refused.json()["message"]
    few = http.post("/v2/embed", json={**body, "max_tokens": 4}).json()
    assert few["meta"]["billed_units"]["input_tokens"] == 3 + 4
    over = http.post("/v2/embed", json={**body, "truncate": "NONE", "max_tokens": 4})
    assert over.status_code == 400


@pytest.mark.parametrize("path", ["/v1/embeddings", "/voyage/v1/embeddings"])
def test_voyage_asks_for_numbers_of_another_kind(http: TestClient, llm: LLM, path: str) -> None:
    expected = llm.embed_array(DOCUMENTS)
    body = {"input": DOCUMENTS, "model": "all-MiniLM-L6-v2", "input_type": "document", "truncation": True}
    plain = http.post(path, json=body).json()
    assert np.allclose([item["embedding"] for item in plain["data"]], expected, atol=1e-6)
    bits = http.post(path, json={**body, "output_dtype": "ubinary"}).json()
    assert np.array_equal([item["embedding"] for item in bits["data"]], np.packbits(expected >= 0, axis=1))
    short = http.post(path, json={**body, "output_dimension": 64}).json()
    assert len(short["data"][0]["embedding"]) == 64
    coded = http.post(path, json={**body, "encoding_format": "base64"}).json()
    assert np.allclose(np.frombuffer(base64.b64decode(coded["data"][1]["embedding"]), "<f4"), expected[1], atol=1e-6)
    long = http.post(path, json={**body, "input": ["w " * 999]})
    assert long.status_code == 200
    assert long.headers["x-poolhouse-truncated"] == "1"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/jina/v1/embeddings"])
def test_jina_reads_the_chunks_of_one_text_together(http: TestClient, llm: LLM, path: str) -> None:
    text = " ".join(DOCUMENTS)
    starts = [0, len(DOCUMENTS[0]) + 1, len(DOCUMENTS[0]) + len(DOCUMENTS[1]) + 2]
    spans = [(start, start + len(part)) for start, part in zip(starts, DOCUMENTS, strict=True)]
    (expected,) = llm.embed_chunks([text], chunks=[spans])
    reply = http.post(path, json={"input": DOCUMENTS, "late_chunking": True}).json()
    assert len(reply["data"]) == 3
    for item, chunk in zip(reply["data"], expected.outputs, strict=True):
        assert np.allclose(item["embedding"], chunk.array, atol=1e-6)
    alone = http.post(path, json={"input": DOCUMENTS}).json()
    assert not np.allclose(alone["data"][0]["embedding"], reply["data"][0]["embedding"], atol=1e-2)
    assert reply["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"] - 4
    assert http.post(path, json={"input": ["a", ""], "late_chunking": True}).status_code == 400
    blank = http.post(path, json={"input": [" ", "\n"], "late_chunking": True})
    assert (blank.status_code, "more than white space" in blank.text) == (400, True)
    huge = http.post(path, json={"input": ["w " * 999], "late_chunking": True})
    assert (huge.status_code, "make chunks smaller" in huge.text) == (400, True)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/jina/v1/embeddings"])
def test_a_long_text_is_read_in_windows_also_where_a_cut_is_allowed(http: TestClient, path: str) -> None:
    body = {"input": [f"{text} {number}" for number in range(30) for text in DOCUMENTS], "late_chunking": True}
    windows, cut = (http.post(path, json={**body, **more}) for more in ({}, {"truncate": True}))
    assert (windows.status_code, cut.status_code) == (200, 200), cut.text
    vectors = [[item["embedding"] for item in reply.json()["data"]] for reply in (windows, cut)]
    assert len(vectors[0]) == 90
    assert np.allclose(*vectors, atol=1e-6)


def test_jina_gives_chunks_or_tokens(http: TestClient) -> None:
    body = {"input": DOCUMENTS, "late_chunking": True, "return_multivector": True}
    reply = http.post("/jina/v1/embeddings", json=body)
    assert (reply.status_code, reply.json()) == (
        400,
        {"detail": "late_chunking gives a vector per chunk; leave return_multivector out."},
    )


def test_a_task_without_an_adapter_is_what_the_text_is() -> None:
    engine = FakeEngine(prompts={"query": "query: "})
    with TestClient(create_app([engine])) as client:
        asked = [
            {"task": "retrieval.query"}, {"input_type": "query"}, {"task": "text-matching"}, {},
        ]  # fmt: skip
        for body in asked:
            assert client.post("/v1/embeddings", json={"input": "x", **body}).status_code == 200
        wrong = client.post("/v1/embeddings", json={"input": "x", "task": "law", "adapter": "medicine"})
        assert wrong.status_code == 400
    assert [request.input_type for request in engine.received] == ["retrieval.query", "query", "text-matching", None]
    assert all(request.adapter is None for request in engine.received)
    engine = FakeEngine()
    engine.describe(adapters=("law",))
    with TestClient(create_app([engine])) as client:
        assert client.post("/v1/embeddings", json={"input": "x", "task": "law"}).status_code == 200
    assert [(request.adapter, request.input_type) for request in engine.received] == [("law", None)]


def test_jina_gives_several_kinds_and_token_vectors(http: TestClient, llm: LLM) -> None:
    body = {"input": [{"text": QUERY}], "embedding_type": ["float", "ubinary"]}
    (item,) = http.post("/jina/v1/embeddings", json=body).json()["data"]
    assert set(item["embedding"]) == {"float", "ubinary"}
    rows = llm.encode(QUERY, pooling_task="token_embed")[0].outputs.data.numpy()
    for path, field in (("/v1/multi-vector", {}), ("/jina/v1/embeddings", {"return_multivector": True})):
        reply = http.post(path, json={"input": QUERY, **field}).json()
        assert reply["data"][0]["object"] == "embeddings"
        assert np.allclose(reply["data"][0]["embeddings"], rows, atol=1e-6)


def test_infinity_shows_its_models_and_counts(http: TestClient) -> None:
    (model,) = http.get("/infinity/models").json()["data"]
    assert model["capabilities"] == ["embed", "rerank"]
    assert set(model["stats"]) == {"queue_fraction", "queue_absolute", "results_pending", "batch_size"}
    assert set(http.get("/infinity/health").json()) == {"unix"}
    reply = http.post("/infinity/embeddings", json={"input": "x", "model": "default/not-specified"}).json()
    assert set(reply) == {"object", "data", "model", "usage", "id", "created"}
    assert set(reply["data"][0]) == {"object", "embedding", "index"}


def test_infinity_strips_what_it_reads(http: TestClient) -> None:
    body = {"query": f" {QUERY}\n", "documents": ["  bread "], "return_documents": True}
    assert http.post("/infinity/rerank", json=body).json()["results"][0]["document"] == "bread"


def test_nvidia_ranks_passages_by_logits(http: TestClient, order: list[int]) -> None:
    body = {"query": {"text": QUERY}, "passages": [{"text": text} for text in DOCUMENTS]}
    rankings = http.post("/v1/ranking", json=body).json()["rankings"]
    assert [ranking["index"] for ranking in rankings] == order
    assert all(set(ranking) == {"index", "logit"} for ranking in rankings)


def test_labels_in_the_words_of_infinity_and_tei(labelled: TestClient) -> None:
    infinity = labelled.post("/infinity/classify", json={"input": ["one", "two"]}).json()
    assert infinity["object"] == "classify"
    for labels in infinity["data"]:
        assert [label["score"] for label in labels] == sorted((label["score"] for label in labels), reverse=True)
        assert {label["label"] for label in labels} == {"calm", "angry", "glad"}
    assert labelled.post("/predict", json={"inputs": "one"}).json() == infinity["data"][0]
    assert labelled.post("/predict", json={"inputs": [["one"], ["two"]]}).json() == infinity["data"]
    (pair,) = labelled.post("/predict", json={"inputs": [["one", "two"]]}).json()
    assert pair == labelled.post("/predict", json={"inputs": ["one", "two"]}).json()


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/cohere/v2/embed", {"texts": ["x"], "model": "none"}, 404, {"message": "The model `none` does not exist. Served models: all-MiniLM-L6-v2."}),
        ("/cohere/v2/embed", {"images": ["data:image/png;base64,"]}, 400, {"message": "MultiModalParam is not supported for BertModel: this model reads texts."}),
        ("/cohere/v2/embed", {"texts": []}, 400, {"message": "Give one of texts, images and inputs, and not an empty one."}),
        ("/v2/embed", {"texts": ["x"], "input_type": "quary"}, 400, {"message": "Unsupported input_type 'quary'. Did you mean 'query'? Supported values: ['document', 'query']"}),
        ("/jina/v1/embeddings", {"input": [{"image": "x"}]}, 400, {"detail": "MultiModalParam is not supported for BertModel: this model reads texts."}),
        ("/voyage/v1/embeddings", {"input": []}, 400, {"detail": "input must hold at least one text."}),
        ("/voyage/v1/rerank", {"query": "q", "documents": []}, 400, {"detail": "documents must hold at least one text."}),
        ("/jina/v1/embeddings", {"input": "x", "model": "none"}, 400, {"detail": "The model `none` does not exist. Served models: all-MiniLM-L6-v2."}),
        ("/jina/v1/embeddings", {}, 422, {"detail": "1 validation error(s): input: Field required"}),
        ("/jina/v1/rerank", {"query": "q", "documents": "x"}, 422, {"detail": "1 validation error(s): documents: Input should be a valid list"}),
        ("/infinity/embeddings", {"input": "x", "model": "none"}, 400, {"error": {"message": "The model `none` does not exist. Served models: all-MiniLM-L6-v2.", "type": None, "param": None, "code": 400}}),
        ("/infinity/embeddings", {}, 422, {"detail": [{"type": "missing", "loc": ["body", "input"], "msg": "Field required"}]}),
        ("/infinity/rerank", {"query": "q", "documents": []}, 422, {"detail": [{"type": "too_short", "loc": ["body", "documents"], "msg": "List should have at least 1 item after validation, not 0"}]}),
        ("/infinity/embeddings", {"input": "x", "modality": "image"}, 400, {"error": {"message": "MultiModalParam is not supported for BertModel: this model reads texts.", "type": None, "param": "input[0]", "code": 400}}),
        ("/embed", {"inputs": ""}, 400, {"error": "`inputs` cannot be empty", "error_type": "Empty"}),
        ("/predict", {"inputs": "x"}, 424, {"error": "The model `all-MiniLM-L6-v2` does not have this route; its tasks: ['embed', 'token_embed'].", "error_type": "Backend"}),
        ("/embed", {"inputs": "x", "prompt_name": "query"}, 422, {"error": "The model has no prompt named 'query'. It has none.", "error_type": "Validation"}),
        ("/tei/v1/embeddings", {"input": "x", "dimensions": 65}, 422, {"message": 'Model "all-MiniLM-L6-v2" only supports [64, 128] matryoshka dimensions, use other output dimensions will lead to poor results.', "code": 422, "type": "Validation"}),
    ],
)  # fmt: skip
def test_each_dialect_says_no_in_its_own_words(
    http: TestClient, path: str, body: dict[str, Any], status: int, error: dict[str, Any]
) -> None:
    reply = http.post(path, json=body)
    assert (reply.status_code, reply.json()) == (status, error)


NO_ROUTE, NO_METHOD = "Not Found: there is no route {}.", "Method Not Allowed: {} takes POST, not GET."


@pytest.mark.parametrize(
    ("path", "status", "words"), [("/{}/nothing-like-it", 404, NO_ROUTE), ("/{}/v1/embeddings", 405, NO_METHOD)]
)
@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("tei", lambda words, _: {"error": words, "error_type": "Validation"}),
        ("jina", lambda words, _: {"detail": words}),
        ("voyage", lambda words, _: {"detail": words}),
    ],
)
def test_what_no_route_takes_is_refused_in_the_words_of_the_prefix(
    http: TestClient, prefix: str, said: Any, path: str, status: int, words: str
) -> None:
    path = path.format(prefix)
    reply = http.get(path)
    assert (reply.status_code, reply.json()) == (status, said(words.format(path), status))


@pytest.mark.parametrize("form", ["both", "flat", "nested"])
def test_what_no_route_takes_is_refused_in_our_own_words_elsewhere(form: Any) -> None:
    with TestClient(create_app([FakeEngine()], ServerSettings(error_format=form))) as client:
        for path, status in (("/teiera", 404), ("/v1/ranking", 405)):
            reply = client.get(path)
            bodies = {"flat": [reply.json()], "nested": [reply.json().get("error")]}
            for problem in bodies.get(form, [reply.json(), reply.json().get("error")]):
                assert (reply.status_code, problem["code"], problem["param"]) == (status, status, None)
        assert client.get("/infinity/nothing").json()["error"]["code"] == 404
        assert set(client.get("/cohere/nothing").json()) == {"message"}


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"input": "x"}, {"id", "object", "created", "model", "data", "usage"}),
        ({"input": "x", "task": "token_embed"}, {"id", "object", "created", "model", "data", "usage"}),
        (RERANK, {"id", "model", "usage", "results"}),
        ({"text_1": "a", "text_2": "b"}, {"id", "object", "created", "model", "data", "usage"}),
    ],
)
def test_invocations_find_the_route_of_a_body(http: TestClient, body: dict[str, Any], fields: set[str]) -> None:
    reply = http.post("/invocations", json=body)
    assert reply.status_code == 200, reply.text
    assert set(reply.json()) == fields
    assert isinstance(http.post("/invocations", json={"inputs": ["x"]}).json(), list)
    nothing = http.post("/invocations", json={"words": "x"})
    assert nothing.status_code == 400
    assert "Cannot find suitable handler" in nothing.json()["message"]


def test_invocations_give_texts_their_own_route_also_where_its_task_is_named(
    http: TestClient, labelled: TestClient
) -> None:
    for task in ("embed", None):
        assert "embedding" in http.post("/invocations", json={"input": "x", "task": task}).json()["data"][0]
    assert "data" in http.post("/invocations", json={"input": "x", "task": "token_embed"}).json()["data"][0]
    assert "probs" in labelled.post("/invocations", json={"input": "x", "task": "classify"}).json()["data"][0]


@pytest.mark.parametrize(
    ("path", "typed", "sent"),
    [
        ("/v1/embeddings", {"dimensions": 64, "truncate_prompt_tokens": 4}, {"dimensions": "64", "truncate_prompt_tokens": 4.0}),
        ("/v1/embeddings", {"use_activation": False, "priority": -1}, {"use_activation": "false", "priority": "-1"}),
        ("/pooling", {"add_special_tokens": False, "task": "token_embed"}, {"add_special_tokens": 0, "task": "token_embed"}),
        ("/rerank", {"top_n": 2, "max_tokens_per_doc": 3}, {"top_n": "2", "max_tokens_per_doc": 3.0}),
        ("/tokenize", {"return_token_strs": True}, {"return_token_strs": "true"}),
        ("/v2/embed", {"output_dimension": 64, "max_tokens": 4}, {"output_dimension": "64", "max_tokens": 4.0}),
    ],
)  # fmt: skip
def test_numbers_and_switches_may_be_written_as_vllm_takes_them(
    http: TestClient, path: str, typed: dict[str, Any], sent: dict[str, Any]
) -> None:
    texts = {"/rerank": RERANK, "/tokenize": {"prompt": QUERY}, "/v2/embed": {"texts": [QUERY]}}
    body = {"request_id": "same", **texts.get(path, {"input": QUERY})}
    expected, got, plain = (http.post(path, json={**body, **fields}).json() for fields in (typed, sent, {}))
    for reply in (expected, got, plain):
        reply.pop("created", None)
        if path == "/v2/embed":
            reply.pop("id")
    assert got == expected != plain


def test_a_body_may_begin_with_a_byte_order_mark(http: TestClient) -> None:
    sent = {"content": b'\xef\xbb\xbf{"input": "x"}', "headers": {"content-type": "application/json"}}
    assert http.post("/v1/embeddings", **sent).status_code == 200
    assert http.post("/v1/embeddings", content=b"\xef\xbb\xbf", headers=sent["headers"]).status_code == 400


def test_tei_tells_what_a_request_cost(http: TestClient) -> None:
    reply = http.post("/embed", json={"inputs": ["one", "two words"]})
    assert (reply.headers["x-compute-characters"], reply.headers["x-compute-tokens"]) == ("12", "7")
    assert reply.json() == http.post("/tei/embed", json={"inputs": ["one", "two words"]}).json()
    info = http.get("/info").json()
    assert info["model_id"] == "all-MiniLM-L6-v2"
    assert info["max_input_length"] == 256
    assert info["max_client_batch_size"] == 8192
