"""Sources: servers on this machine that pictures are fetched from, each answer a function of the request."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Source:
    """A server, and what it was asked: (path, Host) of each request."""

    port: int
    asked: list[tuple[str, str]] = field(default_factory=list)

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


@contextlib.contextmanager
def source(answers: dict[str, bytes | Answer], tls: ssl.SSLContext | None = None) -> Iterator[Source]:
    """Serve these paths until the block ends; bytes are answered with status 200."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append((self.path, self.headers["Host"]))
            answer = answers.get(self.path.partition("?")[0])
            # Whoever asked may be gone.
            with contextlib.suppress(OSError):
                if callable(answer):
                    answer(self)
                else:
                    whole(b"not here" if answer is None else answer, 404 if answer is None else 200)(self)

        def log_message(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    served = Source(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def whole(body: bytes, status: int = 200, **headers: str) -> Answer:
    """A whole answer; names of headers with _ for -."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def redirect(location: str, status: int = 302) -> Answer:
    return whole(b"", status, Location=location)
