"""Routes that extract: our own, GLiNER's, Ollama's and SIE's; an error of one text leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.documented import checked
from tests.server.shapes import misfits

TEXT = "naïve Marie met 居里 in Warsaw 🌍 Marie"
LABELS = ["Marie", "Warsaw", "居里"]
LONG = "word " * 600
# By the text's own slices; a score is the engine's 0.9.
FOUND = [(6, 11, "Marie"), (16, 18, "居里"), (22, 28, "Warsaw"), (31, 36, "Marie")]
PART = {"start": int, "end": int, "text": str, "label": str, "score": float}


@pytest.fixture(scope="module")
def finder() -> FakeEngine:
    return FakeEngine("finder", tasks=("extract",))


@pytest.fixture(scope="module")
def http(finder: FakeEngine) -> Iterator[TestClient]:
    app = create_app([FakeEngine("vectors"), finder], ServerSettings(max_client_batch_size=4))
    with TestClient(app) as client:
        checked(client)
        yield client


def ok(reply: Any) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()


def places(found: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    assert list(misfits([PART], found)) == []
    assert all(part["text"] == TEXT[part["start"] : part["end"]] for part in found)
    assert all(part["label"] == part["text"] and abs(part["score"] - 0.9) < 1e-6 for part in found)
    return [(part["start"], part["end"], part["text"]) for part in found]


@pytest.mark.parametrize("path", ["/v1/extract", "/extract"])
def test_entities_stand_in_characters_of_the_text(http: TestClient, path: str) -> None:
    body = ok(http.post(path, json={"model": "finder", "input": [TEXT, "nothing"], "labels": LABELS}))
    assert (body["object"], body["model"], body["id"].startswith("extract-")) == ("list", "finder", True)
    first, second = body["data"]
    assert places(first["entities"]) == FOUND
    assert second == {"index": 1, "entities": []}
    assert body["usage"]["prompt_tokens"] == len(TEXT.split()) + 1


def test_every_text_may_have_labels_of_its_own(http: TestClient, finder: FakeEngine) -> None:
    sets: list[Any] = [["Marie"], {"Warsaw": "a city", "sea": ""}]
    body = ok(http.post("/v1/extract", json={"model": "finder", "input": [TEXT, TEXT], "labels": sets}))
    assert [{part["label"] for part in item["entities"]} for item in body["data"]] == [{"Marie"}, {"Warsaw"}]
    first, second = (request.labels for request in finder.received[-2:])
    assert first is not None
    assert first.names == ("Marie",)
    assert second is not None
    assert (second.names, second.descriptions) == (("Warsaw", "sea"), ("a city", ""))


def test_options_reach_the_engine(http: TestClient, finder: FakeEngine) -> None:
    options = {"threshold": 0.25, "flat": False, "multi_label": True, "overflow": "error", "adapter": "", "priority": 3}
    ok(http.post("/v1/extract", json={"model": "finder", "input": TEXT, "labels": LABELS, **options}))
    request = finder.received[-1]
    assert request.labels is not None
    assert (request.labels.threshold, request.labels.flat, request.labels.multi_label) == (0.25, False, True)
    assert (request.params.overflow, request.adapter, request.priority) == ("error", "", 3)
    ok(
        http.post(
            "/gliner", json={"text": TEXT, "labels": LABELS, "threshold": 0.95, "flat_ner": False, "multi_label": True}
        )
    )
    labels = finder.received[-1].labels
    assert labels is not None
    assert (labels.threshold, labels.flat, labels.multi_label) == (0.95, False, True)


def test_one_text_that_cannot_be_read_leaves_the_others_alone(http: TestClient) -> None:
    texts = [TEXT, LONG, "Marie"]
    data = ok(http.post("/v1/extract", json={"model": "finder", "input": texts, "labels": LABELS}))["data"]
    assert places(data[0]["entities"]) == FOUND
    assert data[1]["entities"] == []
    assert data[1]["error"]["message"].startswith("The limit is 512 tokens, got 600")
    assert len(data[2]["entities"]) == 1
    replies = ok(http.post("/gliner", json={"text": texts, "labels": LABELS}))
    assert [len(reply["entities"]) for reply in replies] == [4, 0, 1]
    assert "512 tokens" in replies[1]["error"]
    items = [{"id": "a", "text": TEXT}, {"id": "b", "text": LONG}, {"text": "Marie"}]
    body = ok(http.post("/v1/extract/finder", json={"items": items, "params": {"labels": LABELS}}))
    assert [item.get("id") for item in body["items"]] == ["a", "b", None]
    assert places(body["items"][0]["entities"]) == FOUND
    assert body["items"][1]["error"]["code"] == "INPUT_TOO_LONG"
    assert body["usage"] == {"input_tokens": len(TEXT.split()) + 1}
    refused = http.post("/v1/extract", json={"model": "finder", "input": [LONG, LONG], "labels": LABELS})
    assert refused.status_code == 400
    # The next request is answered.
    assert ok(http.post("/gliner", json={"text": TEXT, "labels": LABELS}))["entities"]


def test_gliner_finds_the_model_that_extracts_and_answers_one_text_alone(http: TestClient) -> None:
    body = ok(http.post("/gliner", json={"text": TEXT, "labels": LABELS}))
    assert list(body) == ["entities"]
    assert places(body["entities"]) == FOUND


def test_ollama_is_answered_for_one_text_and_for_several(http: TestClient) -> None:
    one = ok(http.post("/api/extract", json={"model": "finder:latest", "input": TEXT, "labels": LABELS}))
    assert places(one["entities"]) == FOUND
    assert (one["model"], one["prompt_eval_count"]) == ("finder", len(TEXT.split()))
    both = ok(http.post("/api/extract", json={"model": "finder", "input": [TEXT, "sea"], "labels": LABELS}))
    assert [len(found) for found in both["entities"]] == [4, 0]
    refused = http.post("/api/extract", json={"model": "finder", "input": [TEXT, LONG], "labels": LABELS})
    assert (refused.status_code, list(refused.json())) == (400, ["error"])


def test_sie_reads_and_writes_msgpack(http: TestClient) -> None:
    kind = "application/msgpack"
    content = msgpack.packb(
        {"items": [{"text": TEXT}], "params": {"labels": LABELS, "options": {"overflow_policy": "error"}}}
    )
    reply = http.post("/v1/extract/finder", content=content, headers={"content-type": kind, "accept": kind})
    assert (reply.status_code, reply.headers["content-type"]) == (200, kind)
    assert places(msgpack.unpackb(reply.content)["items"][0]["entities"]) == FOUND


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/extract", {"model": "vectors", "input": "a", "labels": ["b"]}, "does not extract by labels"),
        ("/v1/extract", {"model": "finder", "input": "a"}, "labels"),
        ("/v1/extract", {"model": "finder", "input": "a", "labels": []}, "labels is empty"),
        ("/v1/extract", {"model": "finder", "input": "a", "labels": "b"}, "labels must be a list of names"),
        ("/v1/extract", {"model": "finder", "input": "a", "labels": ["b", 3]}, r"labels[1] must be a text"),
        ("/v1/extract", {"model": "finder", "input": "a", "labels": [["b"], ["c"]]}, "2 lists for 1 texts"),
        ("/v1/extract", {"model": "finder", "input": ["a"] * 5, "labels": ["b"]}, "input has 5 entries"),
        ("/v1/extract", {"model": "finder", "input": [["a", "b"]], "labels": ["b"]}, "input"),
        ("/v1/extract", {"model": "finder", "input": "a", "labels": ["b"], "threshold": 2}, "threshold"),
        ("/gliner", {"text": "a", "labels": ["b"], "relations": ["c"]}, "relations"),
        ("/gliner", {"text": "a"}, "labels"),
        ("/api/extract", {"model": "finder", "input": "a", "labels": ["b"], "images": ["x"]}, "images"),
        ("/v1/extract/vectors", {"items": [{"text": "a"}], "params": {"labels": ["b"]}}, "does not extract by labels"),
        ("/v1/extract/finder", {"items": [{"text": "a"}]}, "params"),
        ("/v1/extract/finder", {"items": [{"images": [{"data": ""}]}], "params": {"labels": ["b"]}}, "items[0]"),
        ("/v1/extract/finder", {"items": [{"text": "a"}], "params": {"labels": ["b"], "output_schema": {"x": 1}}}, "output_schema"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(http: TestClient, path: str, body: dict[str, Any], says: str) -> None:
    reply = http.post(path, json=body)
    assert 400 <= reply.status_code < 500
    assert says in reply.text
    assert "Traceback" not in reply.text
