"""`serve --replicas`: real processes behind one port, that die, are renewed under load, and end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import orjson
import pytest
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.engine.interface import ReplicaState, Replicated
from poolhouse.server.app import create_app
from poolhouse.testing import FakeEngine
from tests.checkpoints import save_checkpoint
from tests.server.running import free_port
from tests.server.sockets import wait_until

TEXTS = [f"the moon pulls the sea {'again ' * (number % 7)}" for number in range(40)]


class Server:
    """`poolhouse serve` with two replicas."""

    def __init__(self, folder: Path, *words: str) -> None:
        port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "poolhouse.cli", "serve", str(folder), "--replicas", "2", "--host", "127.0.0.1",
             "--port", str(port), "--disable-access-log", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("Poolhouse serves"), self.process.communicate()[1]

    @property
    def replicas(self) -> set[int]:
        """The processes that it has started and that are not gone."""
        status = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return {int(pid) for path in status for pid in path.read_text().split()}

    def vectors(self, texts: list[str]) -> np.ndarray:
        reply = self.client.post("/v1/embeddings", json={"input": texts})
        assert reply.status_code == 200, reply.text
        return np.array([item["embedding"] for item in reply.json()["data"]], np.float32)

    def metric(self, name: str) -> list[float]:
        """Of each replica."""
        text = self.client.get("/metrics").text
        return [float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)]

    def ready(self) -> httpx.Response:
        return self.client.get("/health/ready")

    def stop(self) -> str:
        """What was logged."""
        self.process.terminate()
        log = self.process.communicate(timeout=60)[1]
        assert self.process.returncode == 0, log
        return log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("served")
    save_checkpoint(folder, "bert, wordpiece")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder, "--log-format", "json")
    yield server
    server.client.close()
    if server.process.poll() is None:
        server.process.kill()
        server.process.communicate()


def test_replicas_are_served_killed_renewed_and_ended(server: Server, folder: Path) -> None:
    with LLM(str(folder)) as llm:
        expected = llm.embed_array(TEXTS)
    np.testing.assert_allclose(server.vectors(TEXTS), expected, atol=2e-6)
    assert not re.search(r"libtorch", Path(f"/proc/{server.process.pid}/maps").read_text())
    assert server.client.post("/tokenize", json={"prompt": TEXTS[0]}).json()["count"] > 3
    assert server.metric("poolhouse_replica_up") == [1, 1]
    assert server.metric("poolhouse_batch_tokens_count")[0] >= 1
    first = server.replicas
    assert len(first) == 2

    for pid in first:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.ready().status_code == 503, "the health of a server without replicas")
    assert server.ready().json() == {
        "status": "restarting",
        "reason": "replica 0 was killed by SIGKILL; replica 1 was killed by SIGKILL",
    }
    assert server.client.get("/health").status_code == 503
    assert server.client.get("/health/live").status_code == 200
    np.testing.assert_allclose(server.vectors(TEXTS), expected, atol=2e-6)
    wait_until(lambda: server.metric("poolhouse_replica_up") == [1, 1], "both to be up")
    assert server.ready().json() == {"status": "ready"}
    assert server.metric("poolhouse_replica_restarts_total") == [1, 1]
    assert server.metric("poolhouse_replica_outstanding_prompts") == [0, 0]

    second, ended = server.replicas, threading.Event()

    def load() -> int:
        rounds = 0
        while not ended.is_set():
            np.testing.assert_allclose(server.vectors(TEXTS), expected, atol=2e-6)
            rounds += 1
            # New replicas need the cores too, to start.
            time.sleep(0.05)
        return rounds

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        try:
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: len(server.replicas - second) >= 1, "the first new replica")
            wait_until(lambda: len(server.replicas - second) == 2, "the second")
            wait_until(lambda: not server.replicas & second, "the end of the old ones")
        finally:
            ended.set()
        assert all(one.result() > 0 for one in loads)

    third = server.replicas
    log = server.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in third)
    lines = [orjson.loads(line) for line in log.splitlines()]
    messages = [line["message"] for line in lines]
    assert "Replica 0 was killed by SIGKILL. It is started again." in messages
    assert "Replica 1 was renewed." in messages
    assert any(message.startswith("replica 1: ") for message in messages)
    assert "Traceback" not in log


def test_what_a_replica_says_of_wrong_settings_is_one_line(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "poolhouse.cli", "serve", str(folder), "--data-parallel-size", "2",
         "--max-model-len", "99999", "--host", "127.0.0.1", "--port", str(free_port()), "--log-level", "critical"],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "--max-model-len" in done.stderr


class FakeReplicas(FakeEngine):
    """Replicas as the server sees them."""

    states = (ReplicaState(0, True, 0, 3), ReplicaState(1, False, 2, 0))
    trouble: str | None = None
    restarted = 0

    def restart(self) -> None:
        self.restarted += 1


def test_health_and_metrics_follow_the_replicas() -> None:
    engine = FakeReplicas("pool")
    assert isinstance(engine, Replicated)
    assert not isinstance(FakeEngine("one"), Replicated)
    with TestClient(create_app([FakeEngine("one"), engine])) as client:
        assert client.get("/health/ready").json() == {"status": "ready"}
        text = client.get("/metrics").text
        assert 'poolhouse_replica_up{model="pool",replica="0"} 1.0' in text
        assert 'poolhouse_replica_up{model="pool",replica="1"} 0.0' in text
        assert 'poolhouse_replica_restarts_total{model="pool",replica="1"} 2.0' in text
        assert 'poolhouse_replica_outstanding_prompts{model="pool",replica="0"} 3.0' in text
        assert 'model="one",replica' not in text
        engine.trouble = 'replica 0 "fell"'
        assert client.get("/health").status_code == 503
        reply = client.get("/health/ready")
        assert (reply.status_code, reply.json()) == (503, {"status": "restarting", "reason": 'replica 0 "fell"'})
        engine.alive = False
        assert client.get("/health/ready").json() == {"status": "failed"}
        engine.alive, engine.trouble = True, None
