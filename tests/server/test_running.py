"""The life of the process: loading, ready, stopped, dead."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.server.running import Running, free_port, running

# An engine that comes once the file beside it exists.
WAITING = (
    "import pathlib\n    while not pathlib.Path({!r}).exists(): time.sleep(0.02)\n    engines = [FakeEngine('late')]"
)


def get(server: Running, path: str) -> httpx.Response:
    return httpx.get(server.url + path, trust_env=False)


def test_the_port_answers_while_models_load(tmp_path: Path) -> None:
    server = Running(WAITING.format(str(tmp_path / "go"))).listening()
    assert get(server, "/health/live").json() == {"status": "live"}
    ready = get(server, "/health/ready")
    assert (ready.status_code, ready.json(), int(ready.headers["retry-after"]) > 0) == (
        503,
        {"status": "loading"},
        True,
    )
    for path in ("/health", "/v1/models", "/metrics", "/nothing"):
        reply = get(server, path)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert reply.json()["message"] == "The model is being loaded; ask again soon."
    refused = httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}, trust_env=False)
    assert (refused.status_code, refused.json()["type"]) == (503, "ServiceUnavailableError")
    (tmp_path / "go").touch()
    server.ready()
    assert server.said == f"Poolhouse serves late on {server.url}\n"
    for path in ("/health", "/health/live", "/health/ready", "/v1/models"):
        assert get(server, path).status_code == 200
    assert get(server, "/health/ready").json() == {"status": "ready"}
    status, log = server.stop()
    assert status == 0
    assert "Traceback" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_stops_at_once(tmp_path: Path, number: signal.Signals) -> None:
    server = Running(WAITING.format(str(tmp_path / "never"))).listening()
    started = time.monotonic()
    server.process.send_signal(number)
    status, log = server.ended()
    assert status == 0
    assert time.monotonic() - started < 10
    assert "Traceback" not in log
    assert server.process.stdout is not None


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ("raise PoolhouseError('There is no model here.')", "poolhouse: There is no model here."),
        ("raise OSError('The disk is gone.')", "poolhouse: The disk is gone."),
        ("raise ZeroDivisionError('a fault of ours')", "ZeroDivisionError: a fault of ours"),
    ],
)
def test_a_load_that_fails_ends_the_process_with_its_reason(load: str, words: str) -> None:
    status, log = Running(load).ended()
    assert status == 1
    assert words in log
    assert ("Traceback" in log) is ("fault of ours" in words)


def test_a_taken_address_is_one_clear_line() -> None:
    with running() as server:
        status, log = Running(port=server.port).ended()
    assert status == 1
    assert "poolhouse: [Errno 98] Address already in use" in log
    assert "Traceback" not in log


DYING = """engines = [FakeEngine('mortal', delay_seconds=1.0)]
    threading.Timer(0.0, lambda: (sys.stdin.readline(), setattr(engines[0], 'alive', False))).start()"""
TELLING = """
    class Telling(FakeEngine):
        def on_fatal(self, callback): self.tell = callback
    engines = [Telling('mortal', delay_seconds=1.0)]
    def die():
        sys.stdin.readline()
        engines[0].tell(PoolhouseError('The device is gone.'))
    threading.Thread(target=die, daemon=True).start()"""


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (DYING, "poolhouse: The engine of mortal died; the log says why."),
        (TELLING, "poolhouse: The device is gone."),
    ],
    ids=["looked at", "told"],
)
def test_a_dead_engine_ends_the_process_after_what_is_in_flight(load: str, words: str) -> None:
    server = Running(load, stdin=True).ready()
    replies: list[int] = []

    def ask() -> None:
        replies.append(httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}, trust_env=False).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    while "poolhouse_requests_in_flight 2.0" not in get(server, "/metrics").text:
        time.sleep(0.01)
    assert server.process.stdin is not None
    server.process.stdin.write("now\n")
    server.process.stdin.flush()
    status, log = server.ended()
    asking.join(30)
    assert status == 1
    assert words in log
    assert "Traceback" not in log
    assert replies == [200]


def test_a_unix_socket_serves_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    server = Running(uds=path)
    server.ready()
    assert server.said == f"Poolhouse serves fake on unix:{path}\n"
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://x") as client:
        assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 200
    with pytest.raises(httpx.ConnectError):
        get(server, "/health")
    status, log = server.stop()
    assert (status, Path(path).exists()) == (0, False), log


def test_ipv6_is_an_address_too() -> None:
    port = free_port()
    server = Running(host="::1", port=port).ready()
    assert server.said == f"Poolhouse serves fake on http://[::1]:{port}\n"
    assert httpx.get(f"http://[::1]:{port}/health", trust_env=False).status_code == 200
    assert server.stop()[0] == 0
