"""Run the server until it is told to stop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence

import uvicorn

from poolhouse.server.app import create_app
from poolhouse.server.serving import Engine
from poolhouse.settings import ServerSettings


def serve(engines: Sequence[Engine], settings: ServerSettings) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish those in flight, within `shutdown_seconds`, and return.

    Prints the address once requests are answered.

    Raises:
        OSError: the address is taken or not ours.
    """
    config = uvicorn.Config(
        create_app(engines, settings),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
    )
    listener = socket.create_server((settings.host, settings.port), backlog=2048)
    port = listener.getsockname()[1]
    names = ", ".join(engine.name for engine in engines)
    server = _Announcing(config, f"Poolhouse serves {names} on http://{_reachable(settings.host)}:{port}")
    # uvicorn raises the signal again once it has stopped; by then the work is done, and that is a success.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])


class _Announcing(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, words: str) -> None:
        super().__init__(config)
        self.words = words

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.words, flush=True)  # noqa: T201 - for people and scripts that wait for it


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104 - compared, not bound
