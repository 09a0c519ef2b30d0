"""A plugin over HTTP: its data in, its own output out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from poolhouse.outputs import PoolingRequestOutput
from poolhouse.server.app import create_app
from poolhouse.testing import FakeEngine


class Lines:
    """The norms of a text's lines."""

    task = "embed"
    answer: Any = None

    def parse_data(self, data: Any) -> Any:
        if not isinstance(data, str):
            raise TypeError("lines are a text")
        return data.splitlines()

    def pre_process(self, prompt: Any, request_id: str | None = None) -> Any:
        return prompt

    def post_process(self, model_output: Sequence[PoolingRequestOutput], request_id: str | None = None) -> Any:
        return self.answer or {"sums": np.array([output.outputs.data.sum() for output in model_output])}


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.describe(plugin=Lines())
    return engine


@pytest.fixture
def http(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app([engine]), raise_server_exceptions=False) as client:
        yield client


def test_a_plugin_gets_its_data_and_gives_its_own_output(http: TestClient) -> None:
    reply = http.post("/pooling", json={"task": "plugin", "data": "one\ntwo words"})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert set(body) == {"request_id", "created_at", "data"}
    rows = http.post("/pooling", json={"task": "embed", "input": ["one", "two words"]}).json()["data"]
    assert body["data"]["sums"] == pytest.approx([sum(row["data"]) for row in rows], abs=1e-5)


@pytest.mark.parametrize("path", ["/pooling", "/invocations"])
def test_data_alone_are_for_the_plugin(http: TestClient, path: str) -> None:
    expected = http.post("/pooling", json={"task": "plugin", "data": "one\ntwo words"}).json()["data"]
    for body in ({"data": "one\ntwo words"}, {"data": "one\ntwo words", "task": None, "priority": 0}):
        assert http.post(path, json=body).json()["data"] == expected
    beside = http.post("/pooling", json={"data": "one", "input": "two words"}).json()
    assert beside["data"][0]["object"] == "pooling"


def test_data_that_a_plugin_does_not_understand_is_a_bad_request(http: TestClient) -> None:
    reply = http.post("/pooling", json={"task": "plugin", "data": 3})
    assert (reply.status_code, reply.json()["param"]) == (400, "data")
    assert "lines are a text" in reply.json()["message"]


def test_without_a_plugin_it_is_said_how_one_is_installed(engine: FakeEngine, http: TestClient) -> None:
    engine.describe(plugin=None)
    reply = http.post("/pooling", json={"task": "plugin", "data": "x"})
    assert reply.status_code == 400
    assert "No IOProcessor plugin installed" in reply.json()["message"]


def test_output_that_is_no_json_is_named(engine: FakeEngine, http: TestClient) -> None:
    assert isinstance(engine.facts.plugin, Lines)
    engine.facts.plugin.answer = object()
    reply = http.post("/pooling", json={"task": "plugin", "data": "x"})
    assert reply.status_code == 500
    assert "cannot be written as JSON" in reply.json()["message"]
