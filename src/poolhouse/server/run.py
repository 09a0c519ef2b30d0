"""Run the server until it is told to stop."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Sequence

import uvicorn

from poolhouse.server.app import create_app
from poolhouse.server.serving import Engine
from poolhouse.settings import ServerSettings

# What clients get to take their refusals in, once `shutdown_seconds` have passed.
_SECONDS_TO_REFUSE = 5


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
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds) + _SECONDS_TO_REFUSE,
    )
    listener = socket.create_server((settings.host, settings.port), backlog=2048)
    port = listener.getsockname()[1]
    names = ", ".join(engine.name for engine in engines)
    words = f"Poolhouse serves {names} on http://{_reachable(settings.host)}:{port}"
    server = _Server(config, words, engines, settings.shutdown_seconds)
    # uvicorn raises the signal again once it has stopped; by then the work is done, and that is a success.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says where it listens, once it does; refuses what it cannot answer in time when it is stopped."""

    def __init__(self, config: uvicorn.Config, words: str, engines: Sequence[Engine], shutdown_seconds: float) -> None:
        super().__init__(config)
        self.words = words
        self.engines = engines
        self.shutdown_seconds = shutdown_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.words, flush=True)  # noqa: T201 - for people and scripts that wait for it

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A closed engine fails what still waits, and the clients hear a proper 503; uvicorn would cut them off.
        late = asyncio.get_running_loop().call_later(self.shutdown_seconds, self._refuse_the_rest)
        await super().shutdown(sockets)
        late.cancel()

    def _refuse_the_rest(self) -> None:
        for engine in self.engines:
            engine.close(0)


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104 - compared, not bound
