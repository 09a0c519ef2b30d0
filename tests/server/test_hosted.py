"""The application under other servers: with and without the lifespan protocol, mounted, copied, by real uvicorn."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.types import ASGIApp

import poolhouse
from poolhouse import ConfigError
from poolhouse.server.app import create_app
from poolhouse.server.process.loading import hosted
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.running import free_port
from tests.server.sockets import wait_until

BODY = {"input": "the moon"}


class Opening:
    """Opens one fake engine each time; counts, and waits or fails as it is told."""

    def __init__(self) -> None:
        self.count = 0
        self.engines: list[FakeEngine] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def __call__(self) -> list[FakeEngine]:
        self.count += 1
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        self.engines = [FakeEngine()]
        return self.engines


@pytest.fixture
def opening() -> Opening:
    return Opening()


def application(opening: Opening, **settings: Any) -> ASGIApp:
    return hosted(opening, ServerSettings.parse(**settings))


def status(client: TestClient, prefix: str = "") -> int:
    return client.post(f"{prefix}/v1/embeddings", json=BODY).status_code


def test_a_server_with_lifespan_starts_when_the_model_is_there_and_may_start_again(opening: Opening) -> None:
    app = application(opening)
    for times in (1, 2):
        with TestClient(app) as client:
            assert opening.count == times
            assert client.get("/health/ready").status_code == 200
            assert status(client) == 200
        assert not opening.engines[0].alive


def test_a_load_that_fails_fails_the_start(opening: Opening) -> None:
    opening.error = ConfigError("There is no such model.")
    told: list[dict[str, Any]] = []

    async def run() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            told.append(message)

        await application(opening)({"type": "lifespan"}, receive, send)

    import asyncio

    asyncio.run(run())
    assert told == [{"type": "lifespan.startup.failed", "message": "ConfigError: There is no such model."}]


def test_without_lifespan_the_first_request_loads_and_probes_do_not_wait(opening: Opening) -> None:
    client = TestClient(application(opening))
    opening.go.clear()
    assert opening.count == 0
    assert client.get("/health/live").status_code == 200
    assert client.get("/v1/health/ready/").json() == {"status": "loading"}
    replies: list[int] = []
    threads = [threading.Thread(target=lambda: replies.append(status(client))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert client.get("/health").status_code == 503
    opening.go.set()
    for thread in threads:
        thread.join(60)
    assert (replies, opening.count) == ([200] * 4, 1)
    assert client.get("/health/ready").json() == {"status": "ready"}


def test_a_load_that_failed_is_tried_again(opening: Opening) -> None:
    client = TestClient(application(opening))
    opening.error = OSError("The disk is away.")
    for times in (1, 2):
        reply = client.post("/v1/embeddings", json=BODY)
        assert (reply.status_code, opening.count) == (503, times)
        assert reply.json()["message"] == "The model could not be loaded; the log says why."
        assert "disk" not in reply.text
    opening.error = None
    assert status(client) == 200


@pytest.mark.parametrize("root_path", ["", "/proxy"])
@pytest.mark.parametrize("outer", [FastAPI, Starlette])
def test_it_may_be_mounted_in_another_application(opening: Opening, outer: type[Starlette], root_path: str) -> None:
    app = outer(routes=[Mount("/pool", application(opening, api_key="k"))])
    with TestClient(app, root_path=root_path, headers={"api-key": "k"}) as client:
        for prefix in ("/pool", f"{root_path}/pool"):
            assert status(client, prefix) == 200
            for path in ("/v1/models", "/health/ready", "/health/ready/", "/tei/health", "/docs", "/metrics", ""):
                assert client.get(prefix + path).status_code == 200, prefix + path
        assert client.get("/v1/models").status_code == 404
        del client.headers["api-key"]
        assert client.get("/pool/v1/models").status_code == 401
        assert client.get("/pool/health/live").status_code == 200


def test_a_copy_loads_by_itself() -> None:
    app = hosted(partial(list, [FakeEngine()]), ServerSettings())
    assert status(TestClient(app)) == 200
    assert status(TestClient(copy.copy(app))) == 200
    unloaded = poolhouse.asgi(max_model_len=64)
    assert pickle.loads(pickle.dumps(unloaded)).app.app.settings == ServerSettings()


def test_an_application_keeps_the_model_that_it_was_made_of(make_llm: Any) -> None:
    with TestClient(create_app([make_llm().engine])) as client:
        gc.collect()
        assert status(client) == 200
    # Nobody else holds it: its threads end with it.
    before = threading.active_count()
    llm = make_llm()
    assert threading.active_count() > before
    del llm
    gc.collect()
    wait_until(lambda: threading.active_count() <= before, "the engine's threads to end")


@pytest.fixture
def make_llm() -> Any:
    return poolhouse.LLM


@pytest.mark.parametrize(
    "options", [{"port": 80}, {"uds": "x"}, {"ssl_keyfile": "x"}, {"keep_alive_seconds": 3}, {"log_format": "json"}]
)
def test_options_of_the_process_belong_to_the_server_around(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}: this is for the server that runs the application"):
        poolhouse.asgi(**options)


def test_options_come_from_the_call_the_file_and_the_environment(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="max_model_leng"):
        poolhouse.asgi(max_model_leng=5)
    with pytest.raises(ConfigError, match="api_key"):
        poolhouse.asgi(api_key="")
    (tmp_path / "serve.yaml").write_text("port: 1\nmax-json-depth: 7\nmax-url-bytes: 300")
    monkeypatch.setenv("POOLHOUSE_PORT", "9000")
    monkeypatch.setenv("POOLHOUSE_MAX_URL_BYTES", "400")
    monkeypatch.setenv("POOLHOUSE_ROOT_PATH", "/there")
    app: Any = poolhouse.asgi("a", config=tmp_path / "serve.yaml", max_json_depth=9)
    settings = app.app.app.settings
    assert (settings.max_json_depth, settings.max_url_bytes, settings.root_path) == (9, 300, "/there")
    (engine,) = app.app.app.open_engines.args[0]
    assert engine.model == "a"


def test_uvicorn_runs_it_as_a_factory() -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--factory", "poolhouse:asgi", "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "POOLHOUSE_MAX_MODEL_LEN": "32"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health/ready"), "the server")
        models = httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).json()
        assert models["data"][0]["max_model_len"] == 32
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/embeddings", json=BODY, trust_env=False)
        assert len(json.loads(reply.text)["data"][0]["embedding"]) == 384
    finally:
        process.terminate()
        log = process.communicate(timeout=60)[1]
    assert "Application shutdown complete" in log
    assert "Traceback" not in log


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
