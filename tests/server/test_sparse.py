"""Sparse vectors over HTTP: TEI's /embed_sparse, and the task sparse of /pooling, by SPLADE and by BGE-M3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.server.app import create_app
from poolhouse.tasks import SparseHead
from poolhouse.testing import FakeEngine
from tests.models.tiny import LAYERS, TEXTS, save, save_m3, tokenizer


@pytest.fixture(scope="module")
def splade(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("splade")
    tokenizer(folder)
    save(folder, "BertForMaskedLM", "BertConfig", LAYERS, std=0.1)
    overrides = {"architectures": ["BertSpladeSparseEmbeddingModel"]}
    with LLM(str(folder), hf_overrides=overrides, served_model_name="splade") as llm:
        yield llm


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("m3")
    save_m3(folder)
    with LLM(str(folder), served_model_name="m3") as llm:
        yield llm


@pytest.fixture(scope="module")
def dense() -> Iterator[FakeEngine]:
    engine = FakeEngine("dense")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def http(splade: LLM, m3: LLM, dense: FakeEngine) -> TestClient:
    # Without its lifespan, which would close the engines.
    return TestClient(create_app([splade.engine, m3.engine, dense]))


@pytest.fixture(params=["splade", "m3"])
def llm(request: pytest.FixtureRequest) -> LLM:
    llm: LLM = request.getfixturevalue(request.param)
    return llm


def by_id(llm: LLM, **options: Any) -> list[dict[int, float]]:
    return [pytest.approx(made.outputs.as_dict(), abs=1e-5) for made in llm.embed_sparse(TEXTS, **options)]


def items(http: TestClient, **body: Any) -> list[Any]:
    reply = http.post("/pooling", json=body)
    assert reply.status_code == 200, reply.text
    return [item["data"] for item in reply.json()["data"]]


@pytest.mark.parametrize("path", ["/embed_sparse", "/tei/embed_sparse"])
def test_entries_are_those_of_the_library_by_rising_index(http: TestClient, llm: LLM, path: str) -> None:
    reply = http.post(path, json={"inputs": TEXTS, "model": llm.engine.facts.name})
    assert reply.status_code == 200, reply.text
    assert [{entry["index"]: entry["value"] for entry in entries} for entries in reply.json()] == by_id(llm)
    for entries in reply.json():
        assert [entry["index"] for entry in entries] == sorted({entry["index"] for entry in entries})
        assert all(set(entry) == {"index", "value"} for entry in entries)
    assert http.post(path, json={"inputs": TEXTS[0], "model": llm.engine.facts.name}).json() == [
        [{"index": entry["index"], "value": pytest.approx(entry["value"], abs=1e-5)} for entry in reply.json()[0]]
    ]
    assert reply.headers["x-compute-characters"] == str(sum(map(len, TEXTS)))


def test_weights_are_written_as_short_as_float32_allows(http: TestClient) -> None:
    reply = http.post("/embed_sparse", json={"inputs": TEXTS[1]})
    for entry in reply.json()[0]:
        assert entry["value"] == float(str(np.float32(entry["value"])))


def test_a_model_without_sparse_vectors_is_the_backends_fault(http: TestClient) -> None:
    reply = http.post("/embed_sparse", json={"inputs": "x", "model": "dense"})
    assert (reply.status_code, reply.json()["error_type"]) == (424, "Backend")
    assert "no sparse vectors" in reply.json()["error"]
    pooled = http.post("/pooling", json={"input": "x", "model": "dense", "task": "sparse"})
    assert (pooled.status_code, pooled.json()["param"]) == (400, "task")


def test_splade_is_not_normalised(http: TestClient, splade: LLM) -> None:
    expected = splade.embed_array(TEXTS)
    for body in ({}, {"normalize": False}):
        got = http.post("/embed", json={"inputs": TEXTS, **body}).json()
        assert np.allclose(got, expected, atol=1e-5)
    refused = http.post("/embed", json={"inputs": TEXTS, "normalize": True})
    assert refused.status_code == 424
    assert refused.json() == {"error": "`normalize` is not available for SPLADE models", "error_type": "Backend"}


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_one_address_for_all_gives_splade_its_entries(http: TestClient, path: str) -> None:
    got = http.post(path, json={"inputs": TEXTS[0]}).json()
    assert set(got[0][0]) == {"index", "value"}
    (vector,) = http.post(path, json={"inputs": TEXTS[0], "model": "m3"}).json()
    assert len(vector) == 32


def test_info_says_splade(http: TestClient) -> None:
    assert http.get("/info").json()["model_type"] == {"embedding": {"pooling": "splade"}}
    assert http.get("/info?model=m3").json()["model_type"] == {"embedding": {"pooling": "cls"}}


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"threshold": 0.3}, {"top_k": 3, "threshold": 0.1}])
def test_pooling_gives_entries_with_their_tokens(http: TestClient, llm: LLM, options: dict[str, Any]) -> None:
    reply = http.post("/pooling", json={"input": TEXTS, "model": llm.engine.facts.name, "task": "sparse", **options})
    assert reply.status_code == 200, reply.text
    assert [item["object"] for item in reply.json()["data"]] == ["pooling"] * len(TEXTS)
    got = [item["data"] for item in reply.json()["data"]]
    assert [{entry["token_id"]: entry["weight"] for entry in entries} for entries in got] == by_id(llm, **options)
    expected = [made.outputs.tokens for made in llm.embed_sparse(TEXTS, **options)]
    assert [[entry["token"] for entry in entries] for entries in got] == expected
    assert all(list(entry) == ["token_id", "token", "weight"] for entries in got for entry in entries)
    assert reply.json()["usage"]["prompt_tokens"] == sum(len(text.split()) + 2 for text in TEXTS)


def test_three_answers_of_bge_m3_come_from_one_pass(http: TestClient, m3: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    submit = m3.engine.submit
    monkeypatch.setattr(m3.engine, "submit", lambda requests: (asked.extend(requests), submit(requests))[1])
    tasks = ["embed", "sparse", "token_embed"]
    got = items(http, model="m3", input=TEXTS, tasks=tasks, top_k=3)
    assert [(request.task, request.further) for request in asked] == [
        ("embed", ("token_embed", "token_classify"))
    ] * len(TEXTS)
    monkeypatch.undo()
    assert all(set(data) == set(tasks) for data in got)
    assert np.allclose([data["embed"] for data in got], m3.embed_array(TEXTS), atol=1e-5)
    sparse = items(http, model="m3", input=TEXTS, task="sparse", top_k=3)
    rows = items(http, model="m3", input=TEXTS, task="token_embed")
    for data, entries, vectors in zip(got, sparse, rows, strict=True):
        assert [(entry["token_id"], entry["token"]) for entry in data["sparse"]] == [
            (entry["token_id"], entry["token"]) for entry in entries
        ]
        assert np.allclose(data["token_embed"], vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "tasks", "keys"),
    [
        ("splade", ["sparse"], {"sparse"}),
        # SPLADE's entries are read from the vector itself.
        ("splade", ["sparse", "embed"], {"embed", "sparse"}),
        ("m3", ["token_classify", "sparse"], {"token_classify", "sparse"}),
    ],
)
def test_the_answer_behind_sparse_vectors_is_made_once_and_shown_where_asked(
    http: TestClient, model: str, tasks: list[str], keys: set[str]
) -> None:
    alone = items(http, model=model, input=TEXTS, task="sparse")
    for data, entries in zip(items(http, model=model, input=TEXTS, tasks=tasks), alone, strict=True):
        assert set(data) == keys
        assert [entry["token_id"] for entry in data["sparse"]] == [entry["token_id"] for entry in entries]


def test_base64_is_for_the_vectors_beside(http: TestClient) -> None:
    (data,) = items(http, model="m3", input=TEXTS[0], tasks=["embed", "sparse"], encoding_format="base64")
    assert isinstance(data["embed"], str)
    assert isinstance(data["sparse"], list)
    assert items(http, model="m3", input=TEXTS[0], task="sparse", encoding_format="base64") == [data["sparse"]]


@pytest.mark.parametrize(
    ("body", "parameter", "message"),
    [
        ({"task": "sparse", "top_k": 0}, "top_k", "top_k must be an integer from 1"),
        ({"task": "sparse", "threshold": -1.0}, "threshold", "threshold must be a number from 0"),
        ({"task": "sparse", "dimensions": 4}, "dimensions", "dimensions means nothing to sparse vectors"),
        ({"task": "sparse", "encoding_format": "bytes"}, "encoding_format", "Sparse vectors come as JSON."),
        ({"tasks": ["embed", "sparse"], "encoding_format": "bytes"}, "encoding_format", "bytes hold one"),
        ({"tasks": ["sparse", "sparse"]}, "task", "'sparse' is asked for twice"),
        ({"tasks": ["embed", "embed", "sparse"]}, "task", "'embed' is asked for twice"),
        ({"task": "embed", "top_k": 3}, "top_k", "top_k belongs to the task 'sparse'."),
        ({"tasks": ["embed"], "threshold": 0.5}, "threshold", "threshold belongs to the task 'sparse'."),
        ({"threshold": 0.5}, "threshold", "threshold belongs to the task 'sparse'."),
    ],
)
def test_what_means_nothing_is_refused(http: TestClient, body: Any, parameter: str, message: str) -> None:
    reply = http.post("/pooling", json={"input": "w1", "model": "m3", **body})
    assert (reply.status_code, reply.json()["param"]) == (400, parameter)
    assert message in reply.json()["message"]


def test_a_cut_is_reported_beside_the_entries(http: TestClient) -> None:
    for body in ({"task": "sparse"}, {"tasks": ["embed", "sparse"]}):
        reply = http.post("/pooling", json={"input": TEXTS[3], "model": "m3", "truncate_prompt_tokens": 6, **body})
        assert reply.json()["data"][0]["original_tokens"] == 22
        assert reply.headers["x-poolhouse-truncated"] == "1"


def test_features_of_an_autoencoder_have_no_tokens() -> None:
    engine = FakeEngine("csr", sparse=SparseHead("embed", "feature", 8))
    with TestClient(create_app([engine])) as http:
        (entries,) = items(http, input="a text", task="sparse")
        assert [entry["token"] for entry in entries] == [None] * 8
        assert [entry["token_id"] for entry in entries] == list(range(8))
        # Vectors of features are scaled like any other.
        assert http.post("/embed", json={"inputs": "a text", "normalize": True}).status_code == 200
