"""HEAD is answered wherever GET is, with the same status and headers and no body."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.running import Running, running
from tests.server.test_routes import routes_of

# Different each time, or by who asks.
_OWN = ("date", "x-request-id")
# Bodies that hold a time or counts.
# Without --batch-dir.
_OFF = ("/v1/files", "/v1/batches")
_CHANGING = ("/metrics", "/infinity/health")


def paths(method: str) -> list[str]:
    routes = routes_of(create_app([FakeEngine()]))
    return sorted({re.sub("{.*}", "fake", path) for known, path in routes if known == method})


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


def asked(connection: http.client.HTTPConnection, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    connection.request(method, path)
    reply = connection.getresponse()
    headers = {name.lower(): value for name, value in reply.getheaders() if name.lower() not in _OWN}
    return reply.status, headers, reply.read()


def test_every_get_route_answers_head_alike(server: Running) -> None:
    gets = paths("GET")
    assert len(gets) > 20
    # On one connection: a body that nobody expects would be read as the next reply.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for path in gets:
        status, headers, body = asked(connection, "GET", path)
        shown, same, nothing = asked(connection, "HEAD", path)
        if path in _CHANGING:
            headers, same = ({**one, "content-length": ""} for one in (headers, same))
        assert (shown, same, nothing) == (status, headers, b""), path
        assert status in ((404,) if path.startswith(_OFF) else (200, 204)), path
        assert body or int(headers.get("content-length") or 0) == 0
    assert len(asked(connection, "GET", "/v1/models")[2]) > 100
    connection.close()


def test_head_of_other_routes_says_no_as_get_does(server: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for path in [*set(paths("POST")) - set(paths("GET")), "/nothing-like-it", "/v1/models/another"]:
        assert asked(connection, "HEAD", path)[0] == asked(connection, "GET", path)[0] >= 400, path
    status, headers, body = asked(connection, "HEAD", "/pooling")
    assert (status, headers["allow"], body) == (405, "POST", b"")
    assert asked(connection, "DELETE", "/v1/models")[1]["allow"] == "GET, HEAD"
    connection.close()


def test_head_is_answered_while_models_load() -> None:
    server = Running("time.sleep(600); engines = []").listening()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for path in ("/health/live", "/health/ready", "/health", "/v1/models", "/nothing-like-it"):
        status, headers, _ = asked(connection, "GET", path)
        assert asked(connection, "HEAD", path) == (status, headers, b""), path
    connection.close()
    server.process.kill()
    server.process.communicate()


def test_no_asgi_server_gets_a_body_for_head() -> None:
    app = create_app([FakeEngine()])
    sent: list[Any] = []

    async def ask(path: str) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await app({"type": "http", "method": "HEAD", "path": path, "headers": [], "query_string": b""}, receive, send)

    for path in ("/health/live", "/v1/models", "/api/tags", "/metrics", "/nothing-like-it"):
        sent.clear()
        anyio.run(ask, path)
        assert b"".join(message.get("body", b"") for message in sent) == b""
        assert any(name == b"content-length" and value != b"0" for name, value in sent[0]["headers"])


def test_head_needs_a_key_where_get_does_and_is_counted_by_its_route() -> None:
    settings = ServerSettings(api_key=(SecretStr("secret"),))
    with TestClient(create_app([FakeEngine()], settings)) as client:
        for path in ("/", "/tei", "/health", "/.well-known/ready"):
            assert client.head(path).status_code == client.get(path).status_code < 300, path
        assert [client.head(path).status_code for path in ("/v1/models", "/info")] == [401, 401]
        key = {"x-api-key": "secret"}
        assert client.head("/v1/models/fake", headers=key).status_code == 200
        assert 'route="/v1/models/{model:path}",status="200"' in client.get("/metrics", headers=key).text
