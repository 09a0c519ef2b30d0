"""The log: a line per request with its id, for people or machines, and nothing of what users wrote."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.server.telemetry.logs import JsonLines, RequestLog, TextLines
from poolhouse.server.telemetry.observer import RequestObserver
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.running import Running


def json_lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines()]


def test_every_line_of_a_json_log_is_an_object_and_each_request_has_one() -> None:
    server = Running(log_format="json", disable_access_log_for_endpoints="/health,/metrics").ready()
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        named = client.post("/v1/embeddings", json={"input": "a secret text"}, headers={"X-Request-Id": "order-66"})
        made = client.post("/v1/embeddings", json={"input": "a secret text", "model": "none"})
        client.get("/health")
        client.get("/metrics")
        client.get("/nowhere?q=secret")
    assert named.headers["x-request-id"] == "order-66"
    status, log = server.stop()
    assert status == 0
    lines = [line for line in json_lines(log) if line["logger"] == "poolhouse.access"]
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", "/v1/embeddings", 200),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/nowhere", 404),
    ]
    assert [line["request_id"] for line in lines[:2]] == ["order-66", made.headers["x-request-id"]]
    assert all(0 < line["seconds"] < 60 and line["client"].startswith("127.0.0.1:") for line in lines)
    assert all(line["time"].endswith("+00:00") and line["level"] == "info" for line in lines)
    assert "secret" not in log


def test_a_text_log_has_a_line_per_request_unless_it_is_off() -> None:
    logs = []
    for off in (False, True):
        server = Running(disable_access_log=off).ready()
        reply = httpx.get(f"{server.url}/version", headers={"X-Request-Id": "abc"}, trust_env=False)
        assert reply.headers["x-request-id"] == "abc"
        logs.append(server.stop()[1])
    (line,) = [line for line in logs[0].splitlines() if "request_id" in line]
    assert " INFO request request_id=abc client=127.0.0.1:" in line
    assert " method=GET route=/version status=200 seconds=0." in line
    assert "request_id" not in logs[1]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"a", True),
        (b"~" * 128, True),
        (b"x" * 129, False),
        (b"", False),
        (b"two words", False),
        (b"t\tab", False),
        (b"\xc3\xa4", False),
    ],
)
def test_an_id_is_kept_where_it_is_visible_and_short(given: bytes, kept: bool) -> None:
    state: dict[str, Any] = {}
    sent = asyncio.run(through_the_log(state, [(b"x-request-id", given)]))
    (echoed,) = [value for name, value in sent[0]["headers"] if name == b"x-request-id"]
    assert echoed.decode() == state["request_id"]
    assert (echoed == given) is kept
    assert kept or len(echoed) == 32


def test_what_a_route_left_in_the_state_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "poolhouse.access"):
        asyncio.run(through_the_log({"model": "m", "items": 3, "tokens": 0, "other": 1}, []))
    fields: dict[str, Any] = caplog.records[0].fields  # type: ignore[attr-defined]
    assert (fields["model"], fields["items"], fields["tokens"]) == ("m", 3, 0)
    assert "other" not in fields


def test_a_path_cannot_write_lines_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(create_app([FakeEngine()])) as client, caplog.at_level(logging.INFO, "poolhouse.access"):
        client.get("/x%0a2025-01-01%20INFO%20forged" + "y" * 500)
    (record,) = [record for record in caplog.records if record.name == "poolhouse.access"]
    line = TextLines().format(record)
    assert "\n" not in line
    assert len(line) < 600
    spoken = logging.LogRecord("n", 20, "", 0, "request", (), None)
    spoken.fields = {"model": 'a b" route=/forged\n'}
    assert TextLines().format(spoken).endswith("""model='a b" route=/forged\\n'""")


def test_a_failure_keeps_its_id_and_its_trace() -> None:
    failing = "engines = [FakeEngine('fake', failure=ZeroDivisionError('deep inside'))]"
    server = Running(failing, log_format="json").ready()
    reply = httpx.post(
        f"{server.url}/v1/embeddings", json={"input": "x"}, headers={"x-request-id": "r1"}, trust_env=False
    )
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "r1")
    _, log = server.stop()
    lines = json_lines(log)
    assert any("ZeroDivisionError: deep inside" in line.get("error", "") for line in lines)
    assert [line["status"] for line in lines if line.get("request_id") == "r1"] == [500]


def test_refusals_are_logged_and_counted_too() -> None:
    with TestClient(create_app([FakeEngine()], ServerSettings.parse(api_key="k"))) as client:
        assert "x-request-id" in client.get("/v1/models").headers
        metrics = client.get("/metrics", headers={"api-key": "k"}).text
    assert 'poolhouse_requests_total{model="",route="unknown",status="401"} 1.0' in metrics


def test_a_unix_socket_has_no_client_address() -> None:
    record = logging.makeLogRecord({"msg": "request", "fields": {"client": None}})
    assert json.loads(JsonLines().format(record))["client"] is None


async def through_the_log(state: dict[str, Any], headers: list[tuple[bytes, bytes]]) -> list[Any]:
    """What is sent for one request to an application that leaves `state`."""
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        raise AssertionError("Nothing is to be read.")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers, "state": state}
    await RequestObserver(application, [RequestLog(ServerSettings())])(scope, receive, send)
    return sent
