"""TEI's dialect: what a request took, what is known of the model, empty texts, and one address for every model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr
from starlette.testclient import TestClient

import poolhouse
from poolhouse import LLM
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

TIMES = ("x-compute-time", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time")
LABELS = {"reranker": 1, "classifier": 2}


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    engines = [
        FakeEngine("vectors", delay_seconds=0.02),
        FakeEngine("labels", tasks=("classify",), label_names={0: "calm", 1: "angry"}, delay_seconds=0.02),
    ]
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def http(engines: list[FakeEngine]) -> TestClient:
    return TestClient(create_app(engines, ServerSettings(max_client_batch_size=4)))


@pytest.mark.parametrize(
    ("path", "body", "characters", "tokens"),
    [
        ("/embed", {"inputs": ["one", "two words"]}, 12, 3),
        ("/embed", {"inputs": [[1, 2, 3], "two words"]}, 12, 5),
        ("/embed_all", {"inputs": "two words"}, 9, 2),
        ("/similarity", {"inputs": {"source_sentence": "one", "sentences": ["two words", "x"]}}, 13, 4),
        ("/predict", {"inputs": [["one"], ["two", "words"]], "model": "labels"}, 11, 3),
        # The query counts once for each text that is read beside it.
        ("/rerank", {"query": "one", "texts": ["a b", "c"]}, 10, 4),
        ("/tei/rerank", {"query": "one", "texts": ["a b", "c"]}, 10, 4),
        ("/tei/v1/embeddings", {"input": ["one", "two words"]}, 12, 3),
        ("/tei/v1/embeddings", {"input": [7, 8]}, 2, 2),
    ],
)
def test_headers_say_what_a_request_took(http: TestClient, path: str, body: Any, characters: int, tokens: int) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-compute-type"] == "cpu+optimized"
    assert (reply.headers["x-compute-characters"], reply.headers["x-compute-tokens"]) == (str(characters), str(tokens))
    times = {name: int(reply.headers[name]) for name in TIMES}
    # Each input ran 20 ms, one after the other: the mean is that of one, not the sum.
    assert times["x-inference-time"] == 20
    assert (times["x-tokenization-time"], times["x-queue-time"]) == (0, 0)
    assert times["x-total-time"] == times["x-compute-time"] >= 20


def test_headers_tell_the_kind_of_device(http: TestClient, engines: list[FakeEngine]) -> None:
    engines[0].describe(dtype="bfloat16", device="cuda")
    assert http.post("/embed", json={"inputs": "x"}).headers["x-compute-type"] == "gpu+optimized"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": ""}),
        ("/embed", {"inputs": []}),
        ("/embed", {"inputs": ["x", ""]}),
        ("/embed_all", {"inputs": ["", "x"]}),
        ("/embed_sparse", {"inputs": ""}),
        ("/predict", {"inputs": "", "model": "labels"}),
        ("/predict", {"inputs": [""], "model": "labels"}),
        ("/predict", {"inputs": ["", ""], "model": "labels"}),
        ("/predict", {"inputs": [["x"], [""]], "model": "labels"}),
        ("/similarity", {"inputs": {"source_sentence": "", "sentences": ["x"]}}),
        ("/similarity", {"inputs": {"source_sentence": "x", "sentences": []}}),
        ("/similarity", {"inputs": {"source_sentence": "x", "sentences": [""]}}),
        ("/rerank", {"query": "x", "texts": []}),
        ("/rerank", {"query": "", "texts": ["x", ""]}),
    ],
)
def test_no_text_is_refused_in_teis_own_word(http: TestClient, path: str, body: Any) -> None:
    reply = http.post(path, json=body)
    assert (reply.status_code, reply.json()["error_type"]) == (400, "Empty")
    assert reply.json()["error"].endswith("cannot be empty")


@pytest.mark.parametrize("given", ["", [], ["x", ""]])
def test_no_text_is_refused_on_teis_route_of_openai_too(http: TestClient, given: Any) -> None:
    reply = http.post("/tei/v1/embeddings", json={"input": given})
    assert (reply.status_code, reply.json()) == (
        400,
        {"message": "`input` cannot be empty", "code": 400, "type": "Empty"},
    )


@pytest.mark.parametrize(
    ("more", "status"),
    [({}, 200), ({"truncate": None}, 200), ({"truncate": False}, 422), ({"truncate_prompt_tokens": 2}, 200)],
)
def test_teis_route_of_openai_cuts_unless_it_says_otherwise(more: dict[str, Any], status: int) -> None:
    http = TestClient(create_app([FakeEngine(max_tokens=4)]))
    reply = http.post("/tei/v1/embeddings", json={"input": "a b c d e f", **more})
    assert reply.status_code == status, reply.text
    if status == 200:
        kept = more.get("truncate_prompt_tokens", 4)
        assert (reply.headers["x-poolhouse-truncated"], reply.json()["usage"]["prompt_tokens"]) == ("1", kept)
    assert http.post("/v1/embeddings", json={"input": "a b c d e f"}).status_code == 400


def test_a_lone_model_answers_to_any_name_on_teis_route_of_openai(http: TestClient) -> None:
    body = {"input": "x", "model": "text-embeddings-inference"}
    lone = TestClient(create_app([FakeEngine("lone")]))
    assert lone.post("/tei/v1/embeddings", json=body).json()["model"] == "lone"
    assert lone.post("/v1/embeddings", json=body).status_code == 404
    # Of several nobody could tell which one was meant.
    assert http.post("/tei/v1/embeddings", json=body).status_code == 404


def test_a_body_of_another_type_is_refused_with_teis_status(http: TestClient) -> None:
    for path, words in (("/embed", "error"), ("/tei/v1/embeddings", "message")):
        reply = http.post(path, content="inputs=x", headers={"content-type": "application/x-www-form-urlencoded"})
        assert (reply.status_code, "must be application/json" in reply.json()[words]) == (415, True)


PROBES = ("/", "/tei", "/tei/", "/tei/health", "/tei/ping")


def test_teis_probes_say_whether_the_engine_can_answer(engines: list[FakeEngine]) -> None:
    http = TestClient(create_app(engines, ServerSettings(api_key=(SecretStr("key"),))))
    assert [(http.get(path).status_code, http.get(path).content) for path in PROBES] == [(200, b"")] * 5
    # What asks the model at these paths needs a key.
    assert [http.post(path, json={"inputs": "x"}).status_code for path in PROBES[:3]] == [401] * 3
    assert http.post("/", json={"inputs": "x"}, headers={"api-key": "key"}).status_code == 200
    engines[0].close()
    assert [http.get(path).status_code for path in PROBES] == [503] * 5


def test_a_pair_may_have_one_empty_side(http: TestClient) -> None:
    assert http.post("/predict", json={"inputs": ["", "x"], "model": "labels"}).status_code == 200
    assert http.post("/rerank", json={"query": "x", "texts": [""]}).status_code == 200


def test_vertex_answers_each_instance_by_its_form(http: TestClient) -> None:
    instances = [{"inputs": "x"}, {"query": "x", "texts": ["y"]}, {"inputs": "x", "model": "labels"}]
    vectors, ranks, labels = http.post("/vertex", json={"instances": instances}).json()["predictions"]
    assert vectors == http.post("/embed", json={"inputs": "x"}).json()
    assert ranks == http.post("/rerank", json={"query": "x", "texts": ["y"]}).json()
    assert {label["label"] for label in labels} == {"calm", "angry"}


def loaded(folder: Path, kind: str) -> LLM:
    """A tiny model; kind: its pooling word, or its head."""
    tokenizer(folder)
    if kind in LABELS:
        save(folder, "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=LABELS[kind])
        return LLM(str(folder))
    save(folder, "BertModel", "BertConfig", LAYERS)
    return LLM(str(folder), pooler_config={"pooling_type": kind}, max_num_batched_tokens=96, tokenizer_workers=3)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("CLS", {"embedding": {"pooling": "cls"}}),
        ("MEAN", {"embedding": {"pooling": "mean"}}),
        ("LAST", {"embedding": {"pooling": "last_token"}}),
        ("reranker", {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}),
        ("classifier", {"classifier": {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}}),
    ],
)  # fmt: skip
def test_info_says_what_is_known_of_the_model(tmp_path: Path, kind: str, expected: Any) -> None:
    with loaded(tmp_path, kind) as llm:
        http = TestClient(create_app([llm.engine]))
        info = http.get("/info").json()
        assert info == http.get("/tei/info").json()
        assert info["model_type"] == expected
        assert (info["model_dtype"], info["version"]) == ("float32", poolhouse.__version__)
        assert info["max_input_length"] == 64
        if kind not in LABELS:
            assert (info["max_batch_tokens"], info["tokenization_workers"]) == (96, 3)
        assert http.get("/info?model=none").json()["error_type"] == "Validation"


def test_a_cross_encoder_ranks_and_predicts_alike(tmp_path: Path) -> None:
    with loaded(tmp_path, "reranker") as llm:
        http = TestClient(create_app([llm.engine]))
        texts = [text for text in TEXTS if len(text) < 60]
        ranks = http.post("/rerank", json={"query": TEXTS[0], "texts": texts, "raw_scores": True}).json()
        pairs = [[TEXTS[0], text] for text in texts]
        scores = [
            labels[0]["score"] for labels in http.post("/predict", json={"inputs": pairs, "raw_scores": True}).json()
        ]
        assert [rank["score"] for rank in ranks] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
        sure = http.post("/rerank", json={"query": TEXTS[0], "texts": texts}).json()
        logits = torch.tensor([rank["score"] for rank in ranks])
        assert [rank["score"] for rank in sure] == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
