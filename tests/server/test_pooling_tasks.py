"""Every task over /pooling, by today's and former words, and models under several names."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from poolhouse import LLM, LateChunkingParams, PoolingParams
from poolhouse.server.app import create_app
from poolhouse.testing import FakeEngine
from tests.models.tiny import LAYERS, TEXTS, save, save_m3, tokenizer


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer(folder)
    save(folder, "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=1)
    with LLM(str(folder), served_model_name=["first", "second"]) as llm:
        yield llm


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("m3")
    save_m3(folder)
    with LLM(str(folder), served_model_name="m3") as llm:
        yield llm


@pytest.fixture(scope="module")
def http(classifier: LLM, m3: LLM) -> TestClient:
    # Without its lifespan, which would close the engines.
    return TestClient(create_app([classifier.engine, m3.engine]))


def pooled(http: TestClient, **body: Any) -> list[Any]:
    reply = http.post("/pooling", json=body)
    assert reply.status_code == 200, reply.text
    return [item["data"] for item in reply.json()["data"]]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/invocations"])
def test_chunks_of_a_text_come_with_their_places(http: TestClient, m3: LLM, path: str) -> None:
    params = PoolingParams(late_chunking_params=LateChunkingParams(chunk_size=3))
    expected = m3.encode(TEXTS, params, pooling_task="token_embed")
    body = {"model": "m3", "input": TEXTS, "late_chunking_params": {"chunk_size": 3}}
    if path == "/pooling":
        body["task"] = "token_embed"
    reply = http.post(path, json=body).json()
    key = "data" if path == "/pooling" else "embedding"
    for place, (item, output) in enumerate(zip(reply["data"], expected, strict=True)):
        assert list(item) == ["index", "object", key, "late_chunking"]
        assert item["index"] == place
        assert np.abs(np.array(item[key], np.float32) - output.outputs.array).max() < 1e-6
        told = output.late_chunking
        assert told is not None
        chunks = [
            {"token_range": list(chunk.token_range), "char_range": chunk.char_range and list(chunk.char_range)}
            for chunk in told.chunks
        ]
        assert item["late_chunking"] == {
            "chunk_size": 3,
            "input_tokens": len(output.prompt_token_ids),
            "chunks": chunks,
            "strategy": "fixed_tokens",
        }
    assert reply["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in expected)


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        ("/v1/embeddings", {"late_chunking_params": {"chunk_size": 0}}, "late_chunking_params.chunk_size"),
        ("/v1/embeddings", {"late_chunking_params": {"chunk_size": "3"}}, "late_chunking_params.chunk_size"),
        ("/v1/embeddings", {"late_chunking_params": {"chunk_size": 2**63}}, "late_chunking_params.chunk_size"),
        ("/v1/embeddings", {"late_chunking_params": {}}, "chunk_size"),
        ("/v1/embeddings", {"late_chunking_params": {"chunk_size": 3, "overlap": 1}}, "overlap"),
        ("/v1/embeddings", {"late_chunking_params": {"chunk_size": 3}, "late_chunking": True}, "late_chunking"),
        ("/v1/embeddings", {"late_chunking_params": {"chunk_size": 3}, "truncate_prompt_tokens": 4}, "what cuts it"),
        ("/v1/embeddings", {"late_chunking_params": {"chunk_size": 3}, "input": [[5, 6]]}, "no token ids"),
        ("/v1/embeddings", {"late_chunking_params": {"chunk_size": 3}, "task": "embed"}, "does not support"),
        ("/pooling", {"late_chunking_params": {"chunk_size": 3}, "task": "embed"}, "does not support"),
        ("/pooling", {"late_chunking_params": {"chunk_size": 3}, "tasks": ["embed", "token_embed"]}, "asked for alone"),
        ("/pooling", {"late_chunking_params": {"chunk_size": 3}, "task": "token_embed", "token_pooling_factor": 2}, "by chunks"),
        ("/v1/embeddings", {"late_chunking_params": {"chunk_size": 3}, "model": "first"}, "does not support Embeddings API"),
    ],
)  # fmt: skip
def test_chunks_that_cannot_be_made_are_refused(http: TestClient, path: str, more: dict[str, Any], words: str) -> None:
    reply = http.post(path, json={"model": "m3", "input": TEXTS, **more})
    assert (reply.status_code, reply.json()["message"] if words not in reply.text else words) == (400, words)


def test_embeddings_are_matrices_where_token_vectors_are_asked_for_or_all_there_are(http: TestClient, m3: LLM) -> None:
    expected = [output.outputs.array for output in m3.encode(TEXTS, pooling_task="token_embed")]
    body = {"model": "m3", "input": TEXTS, "task": "token_embed"}
    items = http.post("/v1/embeddings", json=body).json()["data"]
    for item, matrix in zip(items, expected, strict=True):
        assert list(item) == ["index", "object", "embedding"]
        assert np.abs(np.array(item["embedding"], np.float32) - matrix).max() < 1e-6
    packed = http.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"]
    for item, matrix in zip(packed, expected, strict=True):
        numbers = np.frombuffer(base64.b64decode(item["embedding"]), np.float32).reshape(item["shape"])
        assert np.abs(numbers - matrix).max() < 1e-6
    # A model of nothing else, and one whose owner chose so.
    for tasks in (("token_embed",), ("token_embed", "embed")):
        with TestClient(create_app([FakeEngine(tasks=tasks)])) as only:
            (item,) = only.post("/v1/embeddings", json={"input": "two words"}).json()["data"]
            assert np.shape(item["embedding"]) == (2, 8)
            vector = only.post("/v1/embeddings", json={"input": "two words", "task": "embed"})
            assert vector.status_code == (200 if "embed" in tasks else 400)


@pytest.mark.parametrize(
    ("model", "task"),
    [("first", "classify"), ("first", "token_classify"), ("m3", "embed"), ("m3", "token_embed")],
)
def test_the_rows_of_every_task(http: TestClient, classifier: LLM, m3: LLM, model: str, task: str) -> None:
    llm = m3 if model == "m3" else classifier
    expected = [output.outputs.array for output in llm.encode(TEXTS, pooling_task=task)]
    got = pooled(http, model=model, input=TEXTS, task=task)
    for ours, theirs in zip(got, expected, strict=True):
        assert np.shape(ours) == theirs.shape
        assert np.allclose(ours, theirs, atol=1e-6)


def test_sparse_weights_of_bge_m3_are_a_flat_list(http: TestClient, m3: LLM) -> None:
    expected = [output.outputs.array for output in m3.encode(TEXTS, pooling_task="token_classify")]
    got = pooled(http, model="m3", input=TEXTS, task="token_classify")
    assert [np.shape(weights) for weights in got] == [(len(text.split()),) for text in TEXTS]
    assert all(np.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(got, expected, strict=True))
    (packed,) = pooled(http, model="m3", input=TEXTS[0], task="token_classify", encoding_format="base64")
    assert np.allclose(np.frombuffer(base64.b64decode(packed), "<f4"), expected[0], atol=1e-6)


def test_the_former_task_score_classifies(http: TestClient) -> None:
    with pytest.warns(DeprecationWarning, match="`score` was removed; use `classify`"):
        former = pooled(http, model="first", input=TEXTS[0], task="score")
    assert former == pooled(http, model="first", input=TEXTS[0], task="classify")


def test_tasks_that_a_model_lacks_are_named_with_those_it_has(http: TestClient) -> None:
    for task, words in (
        ("embed", "Unsupported task: 'embed' Supported tasks: ['classify', 'token_classify']"),
        ("plugin", "No IOProcessor plugin installed"),
        ("sing", "Unknown task: 'sing'"),
    ):
        reply = http.post("/pooling", json={"model": "first", "input": "w1", "task": task})
        assert (reply.status_code, reply.json()["param"]) == (400, "task")
        assert words in reply.json()["message"]


@pytest.mark.parametrize("word", ["normalize", "softmax", "activation"])
def test_former_words_mean_use_activation_and_give_way_to_it(http: TestClient, classifier: LLM, word: str) -> None:
    raw = classifier.encode(TEXTS[0], PoolingParams(use_activation=False), pooling_task="classify")[0].outputs.array
    sure = classifier.encode(TEXTS[0], pooling_task="classify")[0].outputs.array
    body = {"model": "first", "input": TEXTS[0], "task": "classify", word: False}
    with pytest.warns(DeprecationWarning, match=f"`{word}` was renamed; use `use_activation`"):
        assert np.allclose(pooled(http, **body), [raw], atol=1e-6)
    with pytest.warns(DeprecationWarning, match="use_activation"):
        assert np.allclose(pooled(http, **body, use_activation=True), [sure], atol=1e-6)
    assert np.allclose(pooled(http, **body | {word: None}), [sure], atol=1e-6)


def test_a_model_answers_to_all_its_names_and_gives_the_first(http: TestClient) -> None:
    for name in ("first", "second"):
        assert http.post("/pooling", json={"model": name, "input": "w1"}).json()["model"] == "first"
    models = http.get("/v1/models").json()["data"]
    assert [(model["id"], model["root"]) for model in models] == [("first", "first"), ("second", "first"), ("m3", "m3")]


def test_of_two_models_with_one_name_the_first_has_it() -> None:
    one, other = FakeEngine("one", width=4), FakeEngine("other", width=16)
    one.describe(aliases=("both",))
    other.describe(aliases=("both", "else"))
    http = TestClient(create_app([one, other]))
    for name, width in (("both", 4), ("else", 16), ("other", 16)):
        reply = http.post("/v1/embeddings", json={"model": name, "input": "x"}).json()
        assert len(reply["data"][0]["embedding"]) == width


def test_the_command_line_takes_names_as_vllm_does_and_speaks_of_former_words(classifier: LLM) -> None:
    folder = classifier.model.facts.path
    words = ["--host", "127.0.0.1", "--port", "0", "--task", "score", "--served-model-name", "first", "second"]
    process = subprocess.Popen(
        [sys.executable, "-m", "poolhouse.cli", "serve", folder, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().rsplit(" ", 1)[-1].strip()
    for body in ({"input": "w1", "model": "second", "softmax": False}, {"input": "w2", "softmax": False}) * 2:
        assert httpx.post(f"{url}/pooling", json=body, timeout=60).json()["model"] == "first"
    process.terminate()
    log = process.communicate(timeout=60)[1]
    assert log.count("The option `task` was renamed") == 1
    assert log.count("Parameter `softmax` was renamed; use `use_activation`") == 1


def test_token_vectors_may_be_clustered(m3: LLM) -> None:
    texts = [*TEXTS[:3]]
    expected = m3.embed_tokens(texts, token_pooling_factor=2)
    with TestClient(create_app([m3.engine])) as http:
        body = {"input": texts, "task": "token_embed", "token_pooling_factor": 2}
        reply = http.post("/pooling", json=body)
        assert reply.status_code == 200, reply.text
        for item, rows in zip(reply.json()["data"], expected, strict=True):
            assert np.allclose(item["data"], rows, atol=1e-5)
        for wrong in (
            {"task": "embed"},
            {"input_type": "query"},
            {"tasks": ["embed"], "task": None},
            {"task": "sparse"},
        ):
            refused = http.post("/pooling", json={**body, **wrong})
            assert refused.status_code == 400, wrong
            assert refused.json()["param"] == "token_pooling_factor"
        assert http.post("/pooling", json={**body, "token_pooling_factor": 0.5}).status_code == 400
