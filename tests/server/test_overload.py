"""Limits of a server: what waits, how long, and how much one request may hold."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.server.engines import Admission
from poolhouse.server.wire.errors import Overloaded
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine


def test_a_full_queue_is_said_with_when_to_come_again_and_recovers() -> None:
    engine = FakeEngine()
    engine.open.clear()
    with TestClient(create_app([engine], ServerSettings(max_queued_prompts=3))) as http:
        replies: list[Any] = []
        waiting = threading.Thread(
            target=lambda: replies.append(http.post("/v1/embeddings", json={"input": ["a", "b"]}))
        )
        waiting.start()
        while len(engine.received) < 2:
            time.sleep(0.01)
        refused = http.post("/v1/embeddings", json={"input": ["c", "d"]})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "2 prompts wait, and 3 may" in refused.json()["message"]
        engine.open.set()
        waiting.join()
        assert replies[0].status_code == 200
        assert http.post("/v1/embeddings", json={"input": ["c", "d"]}).status_code == 200


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    with TestClient(create_app([FakeEngine()], ServerSettings(max_queued_prompts=2))) as http:
        for _ in range(2):
            assert http.post("/v1/embeddings", json={"input": ["a"] * 5}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/embeddings", {"input": ["a"] * 5}, "input"),
        ("/pooling", {"input": [[1]] * 5}, "input"),
        ("/rerank", {"query": "q", "documents": ["a"] * 5}, "documents"),
        ("/score", {"text_1": "q", "text_2": ["a"] * 5}, "documents"),
    ],
)
def test_one_request_may_hold_so_many_items(path: str, body: dict[str, Any], field: str) -> None:
    with TestClient(create_app([FakeEngine()], ServerSettings(max_client_batch_size=4))) as http:
        reply = http.post(path, json=body)
    assert reply.status_code == 400
    assert "has 5 entries; one request may hold 4" in reply.json()["message"]


def test_a_request_that_waits_too_long_leaves_the_queue() -> None:
    engine = FakeEngine()
    engine.open.clear()
    with TestClient(create_app([engine], ServerSettings(request_timeout_seconds=0.1))) as http:
        reply = http.post("/v1/embeddings", json={"input": "a"})
        assert reply.status_code == 504
        assert reply.json()["message"] == "There was no answer within 0.1 seconds (--request-timeout-seconds)."
        assert engine.received[0].future.cancelled()
        engine.open.set()
        assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 200


def test_the_queue_is_emptied_in_the_time_that_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    admission = Admission(100)
    for _ in range(60):
        admission.enter(10)
        now += 1.0
        admission.leave(10)
    admission.enter(100)
    with pytest.raises(Overloaded) as caught:
        admission.enter(50)
    assert caught.value.retry_after == pytest.approx(5.0, rel=0.05)
