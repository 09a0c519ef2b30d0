"""Servers on real sockets: ours around a fake engine, and one that misbehaves as it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import uvicorn

from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine


@contextlib.contextmanager
def serving(engine: FakeEngine, settings: ServerSettings | None = None) -> Iterator[str]:
    """The address of our server around this engine."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app([engine], settings), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


class ScriptedServer:
    """Answers the nth request with the nth act, and all further ones with the last.

    An act is the bytes to send and what follows: keep the connection, close it, or hang and never send more.
    """

    def __init__(self, acts: Sequence[tuple[bytes, str]]) -> None:
        self.acts = list(acts)
        self.requests: list[bytes] = []
        self.connections = 0
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not wake a thread that waits in accept.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.append(connection)
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as stream:
            while head := _head(stream):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                with self._lock:
                    number = len(self.requests)
                    self.requests.append(head + stream.read(length))
                content, then = self.acts[min(number, len(self.acts) - 1)]
                connection.sendall(content)
                if then == "close":
                    return
                if then == "hang":
                    threading.Event().wait(20)


def _head(stream: object) -> bytes:
    head = b""
    while line := stream.readline():  # type: ignore[attr-defined]
        head += line
        if line == b"\r\n":
            return head
    return b""


def reply(body: bytes, status: int = 200, fields: str = "") -> bytes:
    """The bytes of a plain reply."""
    return f"HTTP/1.1 {status} Words\r\ncontent-length: {len(body)}\r\n{fields}\r\n".encode() + body
