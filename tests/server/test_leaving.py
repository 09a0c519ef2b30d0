"""Clients that leave, or read slowly: who is kept waiting, and what is left behind."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from poolhouse.testing import FakeEngine
from tests.server.sockets import Client, InThread, get, in_thread, load, request, wait_until
from tests.server.test_security import certificate

TEXTS = ["the moon", "the sea"]


def half_a_body(url: str, path: str) -> Client:
    client = Client(url)
    client.socket.sendall(request(path, {"input": ["text " * 50] * 50})[:2000])
    return client


def waiting(url: str, path: str) -> Client:
    return Client(url).send(path, {"input": [f"a text {number}" for number in range(5)]})


def leave(client: Client) -> None:
    client.hang_up()


def reset(client: Client) -> None:
    client.hang_up(reset=True)


def half_close(client: Client) -> None:
    client.socket.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("end", [leave, reset, half_close])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
def test_who_leaves_takes_the_prompts_out_of_the_queue_and_others_get_theirs(
    path: str, end: Callable[[Client], None]
) -> None:
    engine = FakeEngine(width=2000, max_tokens=2000)
    with in_thread(engine) as running:
        url = running.url
        (before, descriptors) = (Client(url).ask(path, {"input": TEXTS}).body, idle_descriptors(running))
        engine.open.clear()
        (first, stays) = (Client(url).send(path, {"input": "first"}), Client(url))
        wait_until(lambda: load(url) == 1, "the first, which runs")
        left = [half_a_body(url, path) for _ in range(4)] + [waiting(url, path) for _ in range(8)]
        stays.send(path, {"input": TEXTS})
        wait_until(lambda: load(url) == 1 + 8 * 5 + 2, "all that wait")
        for client in left:
            end(client)
        wait_until(lambda: load(url) == 3, "those that leave to be noticed")
        assert sum(item.future.cancelled() for item in engine.received) == 40
        engine.open.set()
        assert first.reply().status == 200
        assert vectors(stays.reply().body) == vectors(before)
        for client in (first, stays, *left):
            client.hang_up()
        assert load(url) == 0
        assert idle_descriptors(running) == descriptors
        assert 'status="200"' in get(url, "/metrics").body.decode()


def test_who_leaves_amid_a_large_reply_leaves_nothing_behind() -> None:
    engine = FakeEngine(width=5000, max_tokens=2000)
    body = {"input": "word " * 400, "task": "token_embed"}
    with in_thread(engine) as running:
        url = running.url
        assert len(Client(url).ask("/pooling", body).json["data"][0]["data"]) == 400
        descriptors = idle_descriptors(running)
        clients = [Client(url, receive_bytes=4096).send("/pooling", body) for _ in range(6)]
        for number, client in enumerate(clients):
            assert len(client.socket.recv(1000)) > 0
            client.hang_up(reset=number % 2 == 0)
        assert Client(url).ask("/v1/embeddings", {"input": TEXTS}).status == 200
        assert idle_descriptors(running) == descriptors
        assert load(url) == 0


def test_a_slow_reader_of_a_large_reply_keeps_nobody_waiting() -> None:
    engine = FakeEngine(width=5000, max_tokens=2000)
    with in_thread(engine) as running:
        slow = Client(running.url, receive_bytes=4096)
        slow.send("/pooling", {"input": "word " * 400, "task": "token_embed", "encoding_format": "bytes"})
        wait_until(lambda: slow.answered, "the large reply")
        for number in range(20):
            assert Client(running.url).ask("/v1/embeddings", {"input": f"text {number}"}).status == 200
        reply = slow.reply()
        assert (reply.status, len(reply.body)) == (200, 400 * 5000 * 4)


LARGE = {"input": "word " * 400, "task": "token_embed", "encoding_format": "bytes"}


@pytest.mark.parametrize("h11", [False, True], ids=["httptools", "h11"])
def test_a_reply_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch, h11: bool) -> None:
    if h11:
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    engine = FakeEngine(width=5000, max_tokens=2000)
    with in_thread(engine, reply_timeout_seconds=0.5) as running:
        deaf = [Client(running.url, receive_bytes=4096).send("/pooling", LARGE) for _ in range(3)]
        # A second request behind the unread reply, and a reply after which the connection is to be closed.
        deaf[0].send("/pooling", LARGE)
        closing = Client(running.url, receive_bytes=4096)
        closing.socket.sendall(request("/pooling", LARGE).replace(b"Host: x", b"Host: x\r\nConnection: close"))
        wait_until(lambda: len(engine.received) >= 4, "the requests")
        wait_until(running.rests, "all of them to be given up")
        assert Client(running.url).ask("/v1/embeddings", {"input": TEXTS}).status == 200


def test_an_unread_reply_is_given_up_under_tls_too(tmp_path: Path) -> None:
    file, key = certificate(tmp_path)
    engine = FakeEngine(width=5000, max_tokens=2000)
    with in_thread(engine, reply_timeout_seconds=0.5, ssl_certfile=file, ssl_keyfile=key) as running:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
        with ssl.create_default_context(cafile=file).wrap_socket(raw, server_hostname="127.0.0.1") as deaf:
            deaf.sendall(request("/pooling", LARGE))
            wait_until(lambda: len(engine.received) == 1, "the request")
            wait_until(running.rests, "it to be given up")


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_who_reads_a_little_all_the_time_gets_the_whole_reply(tmp_path: Path, unix: bool) -> None:
    engine = FakeEngine(width=5000, max_tokens=2000)
    place = {"uds": str(tmp_path / "socket")} if unix else {}
    with in_thread(engine, reply_timeout_seconds=1.5, **place) as running:
        slow = Client(running.url, receive_bytes=16384).send("/pooling", LARGE)
        wait_until(lambda: slow.answered, "the large reply")
        read = 0
        # For longer than the time in all, and never so long at once; then the rest.
        for _ in range(12):
            time.sleep(0.3)
            read += len(slow.socket.recv(8192))
        while read < 400 * 5000 * 4:
            part = len(slow.socket.recv(1 << 20))
            assert part > 0, "cut"
            read += part


def test_a_slow_reader_gets_its_large_reply_although_the_server_is_stopped() -> None:
    engine = FakeEngine(width=5000, max_tokens=2000)
    with in_thread(engine) as running:
        slow = Client(running.url, receive_bytes=4096)
        slow.send("/pooling", {"input": "word " * 400, "task": "token_embed", "encoding_format": "bytes"})
        wait_until(lambda: slow.answered, "the large reply")
        running.server.stop()
        wait_until(lambda: refused(running.url), "the listener to be closed")
        reply = slow.reply()
        assert (reply.status, len(reply.body)) == (200, 400 * 5000 * 4)


def refused(url: str) -> bool:
    try:
        Client(url).hang_up()
    except OSError:
        return True
    return False


def vectors(body: bytes) -> Any:
    """A reply without what differs each time."""
    return body.partition(b'"data":')[2]


def idle_descriptors(running: InThread) -> int:
    """How many file descriptors are open when all have left."""
    wait_until(running.rests, "the server to rest")
    loop = running.server.servers[0].get_loop()
    names = asyncio.run_coroutine_threadsafe(task_names(), loop).result(60)
    # The server itself, its lifespan, what it waits for there, and this one.
    assert len(names) <= 4, names
    return psutil.Process().num_fds()


async def task_names() -> list[str]:
    return [repr(task) for task in asyncio.all_tasks()]
