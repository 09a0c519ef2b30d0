"""Clients that hold their socket in hand, and the whole server in a thread of this process."""

from __future__ import annotations

import http.client
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from poolhouse.engine.interface import PoolingEngine
from poolhouse.server.process.run import _Server
from poolhouse.settings import ServerSettings


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection. What is sent and what is read are apart, so that one thread can hold many."""

    def __init__(self, url: str, receive_bytes: int | None = None) -> None:
        parts = urlsplit(url)
        self.socket = socket.socket(socket.AF_UNIX if parts.scheme == "unix" else socket.AF_INET)
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(120)
        self.socket.connect(parts.path if parts.scheme == "unix" else (parts.hostname, parts.port))

    def __del__(self) -> None:
        self.socket.close()

    def send(self, path: str, body: Any) -> Client:
        self.socket.sendall(request(path, body))
        return self

    def reply(self) -> Reply:
        """The whole reply; raises `http.client.HTTPException` or OSError where it is cut."""
        response = http.client.HTTPResponse(self.socket)
        with response:
            response.begin()
            return Reply(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )

    def ask(self, path: str, body: Any) -> Reply:
        return self.send(path, body).reply()

    def get(self, path: str) -> Reply:
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return self.reply()

    @property
    def answered(self) -> bool:
        """Whether the first bytes of a reply are there."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def hang_up(self, reset: bool = False) -> None:
        """Close; `reset` lets the server see an error instead of an end."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.socket.close()


def request(path: str, body: Any) -> bytes:
    """The bytes of a POST; a body of bytes is sent as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def get(url: str, path: str) -> Reply:
    """The reply to a GET on a connection of its own."""
    client = Client(url)
    try:
        return client.get(path)
    finally:
        client.hang_up()


def load(url: str) -> int:
    """How many prompts wait or run."""
    count: int = get(url, "/load").json["server_load"]
    return count


def wait_until(reached: Any, what: str) -> None:
    """Ask again and again, for a minute at most."""
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end, f"In vain waited for: {what}"
        time.sleep(0.005)


class InThread:
    """A server whose inside a test can look at: `server` is the uvicorn server, `url` where it answers."""

    def __init__(self, *engines: PoolingEngine, **settings: Any) -> None:
        settings = {"host": "127.0.0.1", "port": 0, "log_level": "critical", "warmup": "none", **settings}
        self.server = _Server(lambda: engines, ServerSettings.parse(**settings))
        self.url = self.server._address()
        self.thread = threading.Thread(target=self.server.run_until_stopped)

    def tasks(self) -> int:
        """Tasks of the event loop that are not done."""
        return len(self.server.server_state.tasks)

    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def rests(self) -> bool:
        """Whether no client is served and nothing waits."""
        return self.tasks() == 0 and self.connections() == 0 and self.server.stopping.in_flight == 0


@contextmanager
def in_thread(*engines: PoolingEngine, **settings: Any) -> Iterator[InThread]:
    """A server that answers, and ends well."""
    with _own_logs():
        running = InThread(*engines, **settings)
        running.thread.start()
        wait_until(lambda: running.server.starting.application is not None, "the server")
        try:
            yield running
        finally:
            running.server.stop()
            running.thread.join(120)
        assert not running.thread.is_alive()


@contextmanager
def _own_logs() -> Iterator[None]:
    """Loggers as they were: a server in this process sets them for all tests that come after."""
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    kept = [(logger, logger.level, logger.propagate, logger.disabled, logger.handlers[:]) for logger in loggers]
    try:
        yield
    finally:
        for logger, level, propagate, disabled, handlers in kept:
            logger.setLevel(level)
            logger.propagate, logger.disabled, logger.handlers = propagate, disabled, handlers
