"""Health, however it is asked for: the truth while models load, while requests are answered, and while the server stops."""

from __future__ import annotations

import signal

import httpx
import pytest
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.server.security import OPEN_PATHS
from poolhouse.server.wire.probes import SPELLINGS
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.running import Running
from tests.server.sockets import Client, wait_until

READY = [path for path, meant in SPELLINGS.items() if meant != "/health/live"]
LIVE = [path for path, meant in SPELLINGS.items() if meant == "/health/live"]
# Loads once the first line is read from standard input, and answers once the second is.
HELD_TWICE = """sys.stdin.readline()
    engines = [FakeEngine('held')]
    engines[0].open.clear()
    threading.Thread(target=lambda: (sys.stdin.readline(), engines[0].open.set()), daemon=True).start()"""


# Where load balancers ask by default.
ROOTS = ["/", "/pool", "/pool/", "/tei", "/tei/", "/pool/tei"]


def spelled(paths: list[str]) -> list[str]:
    """With and without the prefix, and a slash behind."""
    return [f"{root}{path}{end}" for root in ("", "/pool") for path in paths for end in ("", "/")]


def statuses(server: Running, paths: list[str]) -> set[int]:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        return {client.get(path).status_code for path in paths}


def go_on(server: Running) -> None:
    assert server.process.stdin is not None
    server.process.stdin.write("now\n")
    server.process.stdin.flush()


def test_every_spelling_says_the_truth_in_every_state() -> None:
    server = Running(HELD_TWICE, stdin=True, root_path="/pool", api_key="k", log_level="warning").listening()
    assert statuses(server, spelled(LIVE)) == {200}
    assert statuses(server, [*spelled(READY), *ROOTS]) == {503}
    go_on(server)
    server.ready()
    assert statuses(server, spelled(LIVE)) == {200}
    assert statuses(server, [*spelled(READY), *ROOTS]) == {200}
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/pool/v1/health/ready/").json() == {"status": "ready"}
        assert client.get("/v1/models").status_code == 401
    body = {"input": "x"}
    held = Client(server.url)
    held.socket.sendall(
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\napi-key: k\r\ncontent-type: application/json\r\n"
        b'content-length: 14\r\n\r\n{"input": "x"}'
    )
    key = {"api-key": "k"}
    wait_until(
        lambda: httpx.get(f"{server.url}/load", headers=key, trust_env=False).json() == {"server_load": 1}, "a request"
    )
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{server.url}/readyz", trust_env=False).status_code == 503, "the stop")
    assert statuses(server, [*spelled(READY), *ROOTS]) == {503}
    assert statuses(server, spelled(LIVE)) == {200}
    assert httpx.post(f"{server.url}/v1/embeddings", json=body, headers=key, trust_env=False).status_code == 503
    go_on(server)
    assert held.reply().status == 200
    status, log = server.ended()
    assert (status, "Traceback" in log) == (0, False), log


@pytest.mark.parametrize("root_path", ["", "/pool", "pool/", "/a/b"])
def test_a_dead_engine_is_not_ready_by_any_name(root_path: str) -> None:
    engine = FakeEngine()
    settings = ServerSettings.parse(api_key="k", root_path=root_path)
    with TestClient(create_app([engine], settings)) as client:
        for alive in (True, False):
            engine.alive = alive
            for path in SPELLINGS:
                for address in (path, f"{path}/", f"/{root_path.strip('/')}{path}" if root_path else path):
                    reply = client.get(address, follow_redirects=False)
                    assert reply.status_code == (200 if alive or path in LIVE else 503), address


def test_no_other_path_is_open_by_being_like_one_of_these() -> None:
    assert {SPELLINGS[path] for path in SPELLINGS} <= OPEN_PATHS
    closed = [
        "/health/x",
        "/healthy",
        "//health",
        "/v3/health",
        "/health//live",
        "/v1/models/",
        "/health/live/v1/models",
    ]
    with TestClient(create_app([FakeEngine()], ServerSettings.parse(api_key="k", root_path="/pool"))) as client:
        for path in closed:
            assert client.get("http://testserver" + path).status_code == 401, path
            assert client.get(f"http://testserver/pool{path}").status_code == 401, path
