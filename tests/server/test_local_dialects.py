"""Dialects of servers that people run themselves (Ollama, llama.cpp, Weaviate's containers, SIE) and Azure's paths."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from poolhouse import LLM, PoolerConfig, PoolingParams
from poolhouse.server.app import create_app
from poolhouse.server.dialects import sie
from poolhouse.server.wire.errors import Overloaded, failure_of
from poolhouse.tasks import SparseHead
from poolhouse.testing import FakeEngine
from tests.server.documented import checked

TEXTS = ["the moon pulls the sea towards it", "Ünïcode, 数字", "yeast makes bread rise"]
QUERY = "why are there tides"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """MiniLM without its last step, so that normalising can be seen."""
    with LLM(matryoshka_dimensions=(64, 128), pooler_config=PoolerConfig(use_activation=False)) as llm:
        yield llm


@pytest.fixture(scope="module")
def http(llm: LLM) -> Iterator[TestClient]:
    with TestClient(create_app([llm.engine])) as client:
        checked(client)
        yield client


@pytest.fixture(scope="module")
def raw(llm: LLM) -> np.ndarray:
    """What the model makes of the texts; not of unit length."""
    vectors = llm.embed_array(TEXTS)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).min() > 0.1
    return vectors


def served(*engines: FakeEngine) -> TestClient:
    return TestClient(create_app(list(engines)))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def near(got: Any, expected: np.ndarray) -> bool:
    return bool(np.allclose(np.array(got), expected, rtol=1e-5, atol=1e-5))


def test_ollama_hears_vectors_of_unit_length_cut_before_that(http: TestClient, raw: np.ndarray) -> None:
    for more, expected in (
        ({}, raw),
        ({"dimensions": 64}, raw[:, :64]),
        *(({"dimensions": size}, raw) for size in (0, 384, 100_000)),
    ):
        reply = http.post("/api/embed", json={"input": TEXTS, **more}).json()
        assert near(reply["embeddings"], unit(expected))
    assert http.post("/api/embed", json={"input": TEXTS, "dimensions": 65}).status_code == 400
    former = http.post("/api/embeddings", json={"prompt": TEXTS[0]}).json()
    assert near(former["embedding"], raw[0])


def test_ollama_reads_as_much_as_num_ctx_says(http: TestClient, llm: LLM) -> None:
    text = " ".join(TEXTS)
    cut = llm.embed_array([text], pooling_params=PoolingParams(truncate_prompt_tokens=7))
    reply = http.post("/api/embed", json={"input": text, "options": {"num_ctx": 7, "temperature": 0}})
    assert near(reply.json()["embeddings"], unit(cut))
    assert reply.json()["prompt_eval_count"] == 7
    assert reply.headers["x-poolhouse-truncated"] == "1"
    refused = http.post("/api/embed", json={"input": text, "options": {"num_ctx": 7}, "truncate": False})
    assert refused.status_code == 400
    assert refused.json()["error"].startswith("the input length exceeds the context length: ")
    large = http.post("/api/embed", json={"input": text, "options": {"num_ctx": 8192}})
    assert "x-poolhouse-truncated" not in large.headers


@pytest.mark.parametrize("model", ["nomic-embed-text", "all-minilm:latest", "fake:latest", None, ""])
@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings", "/api/show", "/embedding", "/reranking"])
def test_a_lone_model_answers_whatever_it_is_called(path: str, model: str | None) -> None:
    body = {"input": "a", "prompt": "a", "content": "a", "query": "q", "documents": ["a"], "model": model}
    body = {name: value for name, value in body.items() if path == "/embedding" or name != "content"}
    assert served(FakeEngine()).post(path, json=body).status_code == 200


def test_of_several_models_the_name_chooses_and_a_tag_means_nothing() -> None:
    client = served(FakeEngine("one"), FakeEngine("two"))
    for asked, answers in (("two", "two"), ("two:latest", "two"), (None, "one")):
        assert client.post("/api/embed", json={"input": "a", "model": asked}).json()["model"] == answers
    for path in ("/api/embed", "/api/embeddings", "/api/show", "/embedding"):
        assert client.post(path, json={"content": "a", "model": "three"}).status_code == 404
    names = [model["name"] for model in client.get("/api/tags").json()["models"]]
    assert names == ["one:latest", "two:latest"]
    for name in names:
        assert client.post("/api/embed", json={"input": "a", "model": name}).json()["model"] == name.split(":")[0]


@pytest.mark.parametrize(
    ("size", "length"),
    [
        (-1, lambda vector: 1.0),
        (0, lambda vector: np.abs(vector).max() / 32760),
        *((p, lambda vector, p=p: (np.abs(vector) ** p).sum() ** (1 / p)) for p in (1, 2, 3)),
        # So high a power leaves the largest number alone, but for a factor near 1.
        (5000, lambda vector: np.abs(vector).max()),
    ],
)
def test_llama_cpp_hears_vectors_of_the_size_that_it_asks_for(
    http: TestClient, raw: np.ndarray, size: int, length: Callable[[np.ndarray], float]
) -> None:
    reply = http.post("/embedding", json={"content": TEXTS, "embd_normalize": size}).json()
    assert [item["index"] for item in reply] == [0, 1, 2]
    for item, vector in zip(reply, raw.astype(np.float64), strict=True):
        assert np.allclose(item["embedding"], [vector / length(vector)], rtol=1e-3, atol=1e-5)


def test_llama_cpp_hears_a_row_per_token_where_the_model_has_no_other() -> None:
    client = served(FakeEngine(tasks=("token_embed",)))
    (item,) = client.post("/embedding", json={"content": "one two three"}).json()
    assert np.shape(item["embedding"]) == (3, 8)
    assert client.post("/embeddings", json={"content": "one two"}).json()[0]["index"] == 0


def test_weaviate_hears_scores_in_the_order_of_the_documents(http: TestClient, raw: np.ndarray, llm: LLM) -> None:
    cosines = unit(raw) @ unit(llm.embed_array([QUERY]))[0]
    body = {"query": QUERY, "documents": TEXTS}
    for path in ("/rerank", "/weaviate/rerank"):
        reply = http.post(path, json=body).json()
        assert reply["query"] == QUERY
        assert [one["document"] for one in reply["scores"]] == TEXTS
        assert near([one["score"] for one in reply["scores"]], cosines)
        one = http.post(path, json={"query": QUERY, "property": TEXTS[1]}).json()
        assert (one["query"], one["property"]) == (QUERY, TEXTS[1])
        assert near(one["score"], cosines[1])
    # vLLM's clients send the same; they find their results, best first, in the same reply.
    results = http.post("/rerank", json=body).json()["results"]
    assert [result["index"] for result in results] == np.argsort(-cosines).tolist()


@pytest.mark.parametrize("more", [{"model": "all-MiniLM-L6-v2"}, {"top_n": 2}, {"return_documents": False}])
def test_a_body_that_weaviate_does_not_send_has_no_reply_for_it(http: TestClient, more: dict[str, Any]) -> None:
    body = {"query": QUERY, "documents": TEXTS}
    assert "scores" not in http.post("/rerank", json=body | more).json()
    assert "scores" in http.post("/rerank", json=body | dict.fromkeys(more)).json()
    assert "scores" not in http.post("/v1/rerank", json=body).json()


def test_weaviate_names_no_model_and_finds_the_one_that_can() -> None:
    reranker = FakeEngine("reranker", tasks=("classify",), label_names={0: "fits"})
    embedder = FakeEngine("embedder", prompts={"query": "query: "})
    client = served(reranker, embedder)
    for config, use in ((None, None), ({"task_type": "query"}, "query"), ({"task_type": "passage"}, "document")):
        assert client.post("/vectors", json={"text": "a", "config": config}).json()["dim"] == 8
        assert embedder.received[-1].input_type == use
    assert client.post("/weaviate/rerank", json={"query": "q", "documents": ["a"]}).status_code == 200
    assert len(reranker.received) == 1


def test_weaviate_waits_for_a_model_that_is_alive() -> None:
    engine = FakeEngine()
    client = served(engine)
    for under in ("", "/weaviate"):
        assert [client.get(f"{under}/.well-known/{word}").status_code for word in ("live", "ready")] == [204, 204]
        assert client.get(f"{under}/meta").json()["id"] == "fake"
    engine.alive = False
    assert [client.get(f"/.well-known/{word}").status_code for word in ("live", "ready")] == [204, 503]


def m3() -> FakeEngine:
    tasks = ("embed", "token_embed", "token_classify")
    return FakeEngine("BAAI/bge-m3", tasks=tasks, sparse=SparseHead("token_classify", "token", 2**32))


def test_sie_gets_every_vector_of_an_item_from_one_pass() -> None:
    engine = m3()
    body = {
        "items": [{"text": "one two"}, {"id": "b", "text": "two"}],
        "params": {"output_types": ["sparse", "dense", "multivector"]},
    }
    reply = served(engine).post("/v1/encode/BAAI/bge-m3", json=body).json()
    assert [(request.task, request.further) for request in engine.received] == [
        ("token_classify", ("embed", "token_embed"))
    ] * 2
    first, second = reply["items"]
    assert ("id" in first, second["id"]) == (False, "b")
    assert (first["dense"]["dims"], first["multivector"]["num_tokens"], first["multivector"]["token_dims"]) == (8, 2, 8)
    assert reply["usage"] == {"input_tokens": 3}


@pytest.mark.parametrize(
    ("options", "use"), [({"is_query": True}, "query"), ({"is_query": False}, "document"), (None, "document")]
)
def test_sie_says_what_its_texts_are(options: Any, use: str) -> None:
    engine = m3()
    body = {"items": [{"text": "a"}], "params": {"options": options}}
    assert served(engine).post("/v1/encode/BAAI/bge-m3", json=body).status_code == 200
    assert engine.received[0].input_type == use


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "binary"])
def test_sie_gets_numbers_of_every_type(http: TestClient, raw: np.ndarray, dtype: str) -> None:
    body = {"items": [{"text": text} for text in TEXTS], "params": {"output_dtype": dtype}}
    for item, vector in zip(http.post("/v1/encode/all-MiniLM-L6-v2", json=body).json()["items"], raw, strict=True):
        assert (item["dense"]["dtype"], item["dense"]["dims"]) == (dtype, 384)
        low, high = vector.min(), vector.max()
        expected, slack = {
            "float32": (vector, 1e-5),
            "float16": (vector, 2e-3),
            # A number that lies between two steps may be rounded either way.
            "int8": (vector * 127 / np.abs(vector).max(), 0.51),
            "uint8": ((vector - low) * 255 / (high - low), 0.51),
            "binary": (np.packbits(vector > 0), 0),
        }[dtype]
        assert np.abs(np.array(item["dense"]["values"]) - expected).max() <= slack


def read(body: bytes) -> Any:
    """msgpack with arrays, as SIE's SDK reads it."""

    def array(found: dict[Any, Any]) -> Any:
        if not found.get(b"nd"):
            return found
        assert found[b"kind"] == b""
        return np.frombuffer(found[b"data"], found[b"type"]).reshape(found[b"shape"])

    return msgpack.unpackb(body, object_hook=array)


@pytest.mark.parametrize("kind", ["application/msgpack", "application/x-msgpack"])
def test_sie_is_answered_in_msgpack_with_arrays(http: TestClient, raw: np.ndarray, kind: str) -> None:
    body = {
        "items": [{"id": str(index), "text": text} for index, text in enumerate(TEXTS)],
        "params": {"output_types": ["dense", "multivector"]},
    }
    headers = {"content-type": kind, "accept": kind}
    path = "/v1/encode/all-MiniLM-L6-v2"
    reply = http.post(path, content=msgpack.packb(body), headers=headers)
    assert reply.headers["content-type"] == kind
    items = read(reply.content)["items"]
    assert near(np.stack([item["dense"]["values"] for item in items]), raw)
    assert all(item["dense"]["values"].dtype == np.float32 for item in items)
    assert [item["multivector"]["values"].shape for item in items] == [
        (item["multivector"]["num_tokens"], 384) for item in items
    ]
    plain = http.post(path, json=body).json()["items"]
    assert all(near(one["dense"]["values"], other["dense"]["values"]) for one, other in zip(items, plain, strict=True))
    scores = read(
        http.post(
            "/v1/score/all-MiniLM-L6-v2",
            json={"query": {"text": QUERY}, "items": body["items"]},
            headers={"accept": kind},
        ).content
    )
    assert [entry["rank"] for entry in scores["scores"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "content", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x81\xa5items", b"\x91" * 5000, b"\x81\x01\x01"]
)
def test_a_body_that_is_no_msgpack_is_refused(http: TestClient, content: bytes) -> None:
    reply = http.post("/v1/encode/all-MiniLM-L6-v2", content=content, headers={"content-type": "application/msgpack"})
    assert (reply.status_code, reply.json()["detail"]["code"]) == (400, "INVALID_INPUT")


def test_without_its_library_msgpack_is_refused_by_name(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    body = {"items": [{"text": "a"}]}
    path = "/v1/encode/all-MiniLM-L6-v2"
    unread = http.post(path, content=b"\x80", headers={"content-type": "application/msgpack"})
    unwritten = http.post(path, json=body, headers={"accept": "application/msgpack"})
    assert (unread.status_code, unwritten.status_code) == (415, 406)
    assert "poolhouse[msgpack]" in unread.json()["detail"]["message"]
    assert http.post(path, json=body, headers={"accept": "*/*"}).status_code == 200


@pytest.mark.parametrize(
    ("options", "weights"),
    [({"score_mode": "dense"}, (1, 0, 0)), ({"score_mode": "hybrid"}, (0.4, 0.2, 0.4)), ({"score_mode": "hybrid", "score_weights": [1, 0, 3]}, (0.25, 0, 0.75))],
)  # fmt: skip
def test_sie_scores_by_the_mode_that_it_asks_for(options: dict[str, Any], weights: tuple[float, ...]) -> None:
    client = served(m3())
    ask = {"query": {"id": "q", "text": "one two"}, "items": [{"text": "two"}, {"id": "b", "text": "one three"}]}
    parts = [
        {
            entry["item_id"]: entry["score"]
            for entry in client.post("/v1/score/BAAI/bge-m3", json={**ask, "options": {"score_mode": mode}}).json()[
                "scores"
            ]
        }
        for mode in ("dense", "sparse", "colbert")
    ]
    reply = client.post("/v1/score/BAAI/bge-m3", json={**ask, "options": options}).json()
    assert reply["query_id"] == "q"
    assert {entry["item_id"] for entry in reply["scores"]} == {"item-0", "b"}
    assert [entry["score"] for entry in reply["scores"]] == sorted(
        (entry["score"] for entry in reply["scores"]), reverse=True
    )
    for entry in reply["scores"]:
        expected = sum(weight * part[entry["item_id"]] for weight, part in zip(weights, parts, strict=True))
        assert entry["score"] == pytest.approx(expected, abs=1e-5)


def test_a_full_queue_tells_sie_to_ask_again() -> None:
    reply = sie.shape(failure_of(Overloaded("The queue is full.", 2)))
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert reply.body == b'{"detail":{"code":"QUEUE_FULL","message":"The queue is full."}}'


@pytest.mark.parametrize("name", ["plain", "owner/name", "a b", "deep/er/name", "ü/模型", "with:tag", "50%"])
def test_a_model_is_found_by_the_name_in_a_path_whatever_it_holds(name: str) -> None:
    engine = FakeEngine(name)
    engine.describe(aliases=("second/name",), adapters=("law",))
    with TestClient(create_app([engine, FakeEngine("other")])) as client:
        for known in (name, "second/name", "law"):
            kind = {"http_client": client, "api_key": "k", "max_retries": 0}
            model = openai.OpenAI(base_url="http://testserver/v1", **kind).models.retrieve(known)
            assert (model.id, model.object) == (known, "model")
            azure = openai.AzureOpenAI(azure_endpoint="http://testserver", api_version="2024-02-01", **kind)
            reply = azure.embeddings.create(model=known, input="a")
            assert len(reply.data[0].embedding) == 8
            assert azure.models.retrieve(known).id == known


def test_a_name_that_no_model_has_is_answered_with_those_there_are() -> None:
    client = served(FakeEngine("one"), FakeEngine("two/three"))
    for path, shape in (("/v1/models", lambda body: body), ("/openai/models", lambda body: body["error"])):
        reply = client.get(f"{path}/one/four")
        assert (reply.status_code, shape(reply.json())["param"]) == (404, "model")
        assert "one, two/three" in shape(reply.json())["message"]
        assert client.get(f"{path}/").json() == client.get(path).json()
    # A name that no list shows is known nevertheless.
    named = FakeEngine("short")
    named.describe(unlisted_names=("owner/short",))
    known = served(named).get("/v1/models/owner/short")
    assert (known.status_code, known.json()["id"]) == (200, "owner/short")
    # A lone model too: who asks for it by name wants to know whether it is there.
    assert served(FakeEngine()).get("/v1/models/another").status_code == 404


def test_the_types_that_xinference_goes_by() -> None:
    engines = [
        FakeEngine("a"),
        FakeEngine("b", tasks=("classify",), label_names={0: "fits"}),
        FakeEngine("c", tasks=("classify",), label_names={0: "x", 1: "y"}),
    ]
    models = served(*engines).get("/v1/models").json()["data"]
    assert [model["model_type"] for model in models] == ["embedding", "rerank", "classifier"]
