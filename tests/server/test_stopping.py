"""Signals under load: what was sent before them is answered, what comes later hears why not."""

from __future__ import annotations

import http.client
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.server.running import Running
from tests.server.sockets import Client, get, load, wait_until
from tests.server.test_running import WAITING

SLOW = "engines = [FakeEngine('slow', delay_seconds={})]"
# Answers once a line is read from standard input.
HELD = """engines = [FakeEngine('held')]
    engines[0].open.clear()
    threading.Thread(target=lambda: (sys.stdin.readline(), engines[0].open.set()), daemon=True).start()"""


def let_go(server: Running) -> None:
    assert server.process.stdin is not None
    server.process.stdin.write("now\n")
    server.process.stdin.flush()


def stopping(server: Running) -> bool:
    return get(server.url, "/health/ready").status == 503


@pytest.mark.parametrize("h11", [False, True], ids=["httptools", "h11"])
def test_what_was_sent_before_a_stop_is_answered(h11: bool) -> None:
    server = Running(SLOW.format(0.01), h11=h11).ready()
    kept = [Client(server.url) for _ in range(16)]
    assert [client.ask("/v1/embeddings", {"input": "before"}).status for client in kept] == [200] * 16
    # While it stands still, requests and the signal meet in the kernel.
    server.process.send_signal(signal.SIGSTOP)
    clients = kept + [Client(server.url) for _ in range(16)]
    for number, client in enumerate(clients):
        client.send("/v1/embeddings", {"input": f"text {number}"})
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)  # so that all its timers are due as well
    server.process.send_signal(signal.SIGCONT)
    replies = [client.reply() for client in clients]
    assert [reply.status for reply in replies] == [200] * 32
    assert len({str(reply.json["data"][0]["embedding"]) for reply in replies}) == 32
    assert server.ended()[0] == 0


def test_what_comes_while_a_stop_waits_hears_503_and_a_second_sigterm_changes_nothing() -> None:
    server = Running(HELD, stdin=True).ready()
    early, idle = Client(server.url).send("/v1/embeddings", {"input": "early"}), Client(server.url)
    assert idle.get("/health").status == 200
    wait_until(lambda: load(server.url) == 1, "the early request")
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: stopping(server), "the stop")
    assert get(server.url, "/health/ready").json == {"status": "stopping"}
    assert get(server.url, "/health/live").json == {"status": "live"}
    server.process.send_signal(signal.SIGTERM)
    for client in (idle, Client(server.url)):
        late = client.ask("/v1/embeddings", {"input": "late"})
        assert (late.status, late.headers["retry-after"], late.headers["connection"]) == (503, "5", "close")
        assert late.json["message"] == "The server is being stopped; ask another one, or ask again soon."
        assert client.socket.recv(1) == b""
    assert not early.answered
    let_go(server)
    assert early.reply().status == 200
    status, log = server.ended()
    assert (status, "Traceback" in log) == (0, False), log


def test_a_second_sigterm_while_loading_changes_nothing(tmp_path: Path) -> None:
    server = Running(WAITING.format(str(tmp_path / "never"))).listening()
    for _ in range(3):
        server.process.send_signal(signal.SIGTERM)
    status, log = server.ended()
    assert (status, "Traceback" in log) == (0, False), log


def test_a_stop_under_load_loses_nothing() -> None:
    server = Running(SLOW.format(0.001)).ready()
    told = threading.Event()
    outcomes: list[tuple[str, int]] = []

    def ask() -> None:
        client = Client(server.url)
        while True:
            when = "after" if told.is_set() else "before"
            try:
                reply = client.ask("/v1/embeddings", {"input": ["a", "b"]})
            except (OSError, http.client.BadStatusLine):
                # Closed without a byte of a reply, which clients may and do ask again elsewhere.
                outcomes.append((when, 0))
                return
            outcomes.append((when, reply.status))
            if reply.headers.get("connection") == "close":
                return

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(outcomes) > 200, "the load")
    # Those under way at this moment count as before.
    server.process.send_signal(signal.SIGTERM)
    told.set()
    status, log = server.ended()
    for thread in threads:
        thread.join(60)
    assert (status, "Traceback" in log) == (0, False), log
    assert {status for when, status in outcomes if when == "before"} == {200}
    assert {status for when, status in outcomes if when == "after"} <= {0, 200, 503}
