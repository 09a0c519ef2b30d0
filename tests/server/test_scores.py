"""/score, /rerank and /classify: fields, shapes, and the offline answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.documented import checked

QUERY = "why are there tides"
DOCUMENTS = ["yeast makes bread rise", "the moon pulls the sea towards it", "tides follow the moon"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


@pytest.fixture(scope="module")
def http(llm: LLM) -> Iterator[TestClient]:
    with TestClient(create_app([llm.engine])) as client:
        checked(client)
        yield client


@pytest.fixture(scope="module")
def offline(llm: LLM) -> list[float]:
    return [output.outputs.score for output in llm.score(QUERY, DOCUMENTS)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")],
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_each_spelling_of_the_sides_gives_the_offline_scores(
    http: TestClient, offline: list[float], path: str, ours: str, theirs: str
) -> None:
    body = http.post(path, json={ours: QUERY, theirs: DOCUMENTS}).json()
    assert set(body) == {"id", "object", "created", "model", "data", "usage"}
    assert body["id"].startswith("score-")
    assert [(item["index"], item["object"]) for item in body["data"]] == [(0, "score"), (1, "score"), (2, "score")]
    assert [item["score"] for item in body["data"]] == pytest.approx(offline, abs=1e-6)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0


def test_pairs_may_be_one_to_one_and_in_parts(http: TestClient, offline: list[float]) -> None:
    parts = [{"content": [{"type": "text", "text": text}]} for text in DOCUMENTS]
    body = http.post("/score", json={"data_1": [QUERY] * 3, "data_2": parts}).json()
    assert [item["score"] for item in body["data"]] == pytest.approx(offline, abs=1e-6)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_back_best_first(http: TestClient, offline: list[float], path: str) -> None:
    body = http.post(path, json={"query": QUERY, "documents": DOCUMENTS}).json()
    order = sorted(range(3), key=lambda place: -offline[place])
    assert [result["index"] for result in body["results"]] == order
    assert body["results"][0]["document"] == {"text": DOCUMENTS[order[0]], "multi_modal": None}
    assert [result["relevance_score"] for result in body["results"]] == pytest.approx(
        [offline[place] for place in order], abs=1e-6
    )
    best = http.post(path, json={"query": QUERY, "documents": DOCUMENTS, "top_n": 1, "return_documents": False}).json()
    assert [set(result) for result in best["results"]] == [{"index", "relevance_score"}]


@pytest.mark.parametrize(
    "document", [DOCUMENTS[1], {"text": DOCUMENTS[1]}, {"content": [{"type": "text", "text": DOCUMENTS[1]}]}]
)
def test_a_single_document_may_stand_bare(http: TestClient, offline: list[float], document: Any) -> None:
    (result,) = http.post("/rerank", json={"query": QUERY, "documents": document}).json()["results"]
    assert (result["index"], result["document"]["text"]) == (0, DOCUMENTS[1])
    assert result["relevance_score"] == pytest.approx(offline[1], abs=1e-6)


def test_equal_documents_keep_their_order(http: TestClient) -> None:
    body = http.post("/rerank", json={"query": QUERY, "documents": ["same"] * 20}).json()
    assert [result["index"] for result in body["results"]] == list(range(20))


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/score", {"queries": "a"}, "queries", "Give the two sides to score in one way"),
        ("/score", {"queries": "a", "documents": "b", "text_1": "a", "text_2": "b"}, "queries", "in one way"),
        ("/score", {"queries": [], "documents": "b"}, "queries", "At least one text element"),
        ("/score", {"queries": "a", "documents": []}, "documents", "At least one text_pair element"),
        ("/score", {"queries": ["a", "b"], "documents": ["c"] * 3}, "queries", "must be either 1:1, 1:N or N:N"),
        ("/score", {"queries": "a", "documents": ["b", 3]}, "documents[1]", "documents[1] is int"),
        ("/score", {"queries": "a", "documents": "b", "max_tokens_per_doc": 9999}, "max_tokens_per_doc", "must be below"),
        ("/score", {"queries": "a", "documents": "b", "chat_template": "{{ x }}"}, "chat_template", "not allowed"),
        ("/score", {"queries": "a", "documents": "b", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "chat_template_kwargs is for cross-encoders"),
        ("/rerank", {"query": "a", "documents": 3}, "documents", "documents is int"),
        ("/rerank", {"query": "a", "documents": []}, "documents", "At least one text_pair element"),
        ("/rerank", {"query": ["a"], "documents": ["b"]}, "query", "must be one text"),
        ("/rerank", {"documents": ["b"]}, "body.query", "Field required"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "body.top_n", "greater than or equal to 0"),
        ("/rerank", {"query": "a", "documents": ["b", "w " * 999]}, "input_tokens", "documents[1]: This model's maximum"),
        ("/classify", {"input": "a"}, "model", "does not support Classification API"),
        ("/classify_tokens", {"input": "a"}, "model", "no labels for tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_said(
    http: TestClient, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 400
    assert words in reply.json()["message"]
    assert reply.json()["param"] == param


def test_a_cut_document_is_said_to_be_cut(http: TestClient) -> None:
    reply = http.post(
        "/rerank", json={"query": QUERY, "documents": ["short", "w " * 999], "truncate_prompt_tokens": -1}
    )
    results = {result["index"]: result for result in reply.json()["results"]}
    assert "truncated" not in results[0]
    assert results[1]["truncated"] is True
    assert reply.headers["x-poolhouse-truncated"] == "1"


def test_labels_come_with_the_probability_of_each() -> None:
    engine = FakeEngine(tasks=("classify",), label_names={0: "calm", 1: "angry", 2: "glad"})
    with TestClient(create_app([engine])) as http:
        checked(http)
        body = http.post("/classify", json={"input": ["one", "two words"]}).json()
    assert body["id"].startswith("classify-")
    for index, item in enumerate(body["data"]):
        assert set(item) == {"index", "label", "probs", "num_classes"}
        assert (item["index"], item["num_classes"]) == (index, 3)
        assert item["label"] == ("calm", "angry", "glad")[max(range(3), key=item["probs"].__getitem__)]
    assert body["usage"]["prompt_tokens"] == 3


def test_labels_of_the_request_are_compared(judge: TestClient) -> None:
    texts, labels = ["one", "two words", "three"], ["calm", "angry", "glad", "sad"]
    body = judge.post("/v1/classify", json={"input": texts, "labels": labels}).json()
    for index, item in enumerate(body["data"]):
        assert set(item) == {"index", "label", "probs", "num_classes"}
        assert (item["index"], item["num_classes"]) == (index, 4)
        assert sum(item["probs"]) == pytest.approx(1)
        assert item["label"] == labels[max(range(4), key=item["probs"].__getitem__)]
        alone = judge.post("/classify", json={"input": texts[index], "labels": labels}).json()["data"]
        assert alone[0]["probs"] == item["probs"]
    own = judge.post("/classify", json={"input": texts, "labels": [labels[:2], labels[1:], labels[:1]]}).json()["data"]
    assert [item["num_classes"] for item in own] == [2, 3, 1]
    several = judge.post("/classify", json={"input": "one", "labels": labels, "multi_label": True}).json()["data"][0]
    assert sum(several["probs"]) != pytest.approx(1)
    raw = judge.post("/classify", json={"input": "one", "labels": labels, "use_activation": False}).json()["data"][0]
    assert min(raw["probs"]) < 0 or max(raw["probs"]) > 1 or sum(raw["probs"]) != pytest.approx(1)


@pytest.fixture(scope="module")
def judge() -> Iterator[TestClient]:
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    engines = [FakeEngine("judge", tasks=("classify",), label_names=names, max_tokens=20)]
    engines += [FakeEngine("moods", tasks=("classify",), label_names={0: "calm", 1: "angry"}), FakeEngine("vectors")]
    with TestClient(create_app(engines, ServerSettings(max_client_batch_size=12))) as http:
        checked(http)
        yield http


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"labels": []}, "labels", "labels is empty"),
        ({"labels": "a"}, "labels", "labels must be a list of names"),
        ({"labels": ["a", "a"]}, "labels", "'a' twice"),
        ({"labels": ["a", 5]}, "labels[1]", "labels[1] must be a text"),
        ({"labels": [["a"], ["b"]]}, "labels", "2 lists for 1 texts"),
        ({"labels": list("abcdefghijklm")}, "labels", "make 13 pairs; one request may hold 12"),
        ({"labels": ["a"], "hypothesis_template": "so"}, "hypothesis_template", "must hold {} once"),
        ({"labels": ["a"], "input": [1, 2]}, "input[0]", "labels are for texts"),
        ({"labels": ["a"], "input": ["one", "w " * 30]}, "input_tokens", "input[1]: The limit is 20 tokens"),
        ({"labels": ["a"], "model": "moods"}, "labels", "labels of its own: ['calm', 'angry']"),
        ({"labels": ["a"], "model": "vectors"}, "model", "does not support Classification API"),
        ({"multi_label": True}, "labels", "give labels too"),
    ],
)
def test_labels_that_cannot_be_compared_are_said(
    judge: TestClient, body: dict[str, Any], param: str, words: str
) -> None:
    reply = judge.post("/classify", json={"input": "one", **body})
    assert reply.status_code == 400, reply.text
    assert words in reply.json()["message"]
    assert reply.json()["param"] == param


def test_a_request_template_is_taken_where_it_is_trusted() -> None:
    engine = FakeEngine(tasks=("classify",), label_names={0: "fits"})
    template = "{{ messages[0]['content'] }} ? {{ messages[1]['content'] }}"
    settings = ServerSettings(trust_request_chat_template=True)
    with TestClient(create_app([engine], settings)) as http:
        checked(http)
        reply = http.post("/score", json={"queries": "a", "documents": "b", "chat_template": template})
    assert reply.status_code == 200, reply.text
    bound = engine.received[0].prompt.template
    assert bound is not None
    assert bound.render("a", "b") == "a ? b"
