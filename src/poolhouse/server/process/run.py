"""Run: our own server, from its listening sockets to the last reply after a signal to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from poolhouse.engine.interface import PoolingEngine, Replicated
from poolhouse.errors import ConfigError, EngineError, PoolhouseError
from poolhouse.server.app import create_app
from poolhouse.server.batches import store
from poolhouse.server.models_dir import ModelsDir
from poolhouse.server.on_demand import OnDemand
from poolhouse.server.process.connections import Edge, bounded_protocol
from poolhouse.server.process.listening import Listeners
from poolhouse.server.process.loading import Starting, Stopping
from poolhouse.server.routing import Addressed
from poolhouse.server.security import CertificateFiles, api_keys, tls_options
from poolhouse.server.telemetry import tracing
from poolhouse.server.telemetry.logs import give_up_unread, logging_config, say
from poolhouse.server.wire.errors import SHAPES
from poolhouse.settings import ServerSettings

log = logging.getLogger("poolhouse")

# Time for clients to read their refusals, once `shutdown_seconds` have passed.
_SECONDS_TO_REFUSE = 5
# Within these rounds of the event loop a connection is accepted, its request read and handed on; seconds of a round.
_ROUNDS_TO_ACCEPT, _SECONDS_PER_ROUND = 5, 0.02
# Between two looks at the certificate files.
_SECONDS_TO_REFRESH = 10


def serve(
    open_engines: Callable[[], Sequence[PoolingEngine]], settings: ServerSettings, models_dir: ModelsDir | None = None
) -> None:
    """Load models and answer requests until SIGTERM or SIGINT; then finish those in flight and return.

    The address answers at once, with 503 until the engines are open; then it is printed. Models of `models_dir` are opened
    when requests ask for them. A stop waits for `shutdown_seconds`; what comes meanwhile gets 503.

    Raises:
        ConfigError: keys, certificates or traces that cannot be used.
        OSError: the address is taken or not ours.
        EngineError: an engine died. Otherwise what `open_engines` raises.
    """
    api_keys(settings)
    tracing.check(settings)
    if settings.batch_dir is not None:
        store.check(Path(settings.batch_dir))
    server = _Server(open_engines, settings, models_dir)
    # uvicorn raises the signal again once it has stopped; by then the work is done, so it counts as a success.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if hasattr(signal, "SIGHUP"):
        before = signal.getsignal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, lambda *_: server.renew(before))
    try:
        server.run_until_stopped()
    finally:
        give_up_unread()
    if server.failure is not None:
        raise server.failure
    if server.loads:
        # Stopped while loading. A thread inside torch while the interpreter is taken down would abort the process.
        logging.shutdown()
        os._exit(0)


class _Server(uvicorn.Server):
    """Prints where it listens, once it answers; refuses what it cannot answer in time; stops when an engine dies."""

    def __init__(
        self,
        open_engines: Callable[[], Sequence[PoolingEngine]],
        settings: ServerSettings,
        models_dir: ModelsDir | None = None,
    ) -> None:
        self.open_engines = open_engines
        self.models_dir = models_dir
        self.settings = settings
        self.engines: Sequence[PoolingEngine] = ()
        self.on_demand: OnDemand | None = None
        self.failure: BaseException | None = None
        shape = SHAPES[settings.error_format]
        self.starting = Starting(self._load, settings, ready=self._print_address, failed=self.die)
        self.stopping = Stopping(self.starting, shape)
        super().__init__(_configured(Addressed(Edge(self.stopping), settings.root_path), settings))
        try:
            self.config.load()
        except ssl.SSLError as error:
            raise ConfigError(f"The TLS certificate, key or ciphers cannot be used: {error}") from None
        self.listeners = Listeners(settings)
        self.certificates = (
            CertificateFiles(self.config.ssl, settings)
            if settings.enable_ssl_refresh and self.config.ssl is not None
            else None
        )

    @property
    def loads(self) -> bool:
        """Whether a thread loads a model, or closes one."""
        starts = self.starting.thread is not None and self.starting.thread.is_alive()
        return starts or (self.on_demand is not None and self.on_demand.busy)

    def run_until_stopped(self) -> None:
        """Serve; the unix socket is gone afterwards."""
        log.info("Listening on %s; loading.", self._address())
        if self.listeners.to_all and not api_keys(self.settings) and self.settings.ssl_cert_reqs != ssl.CERT_REQUIRED:
            log.warning(
                "There is no key, and every address of this machine is listened on: whoever reaches it is answered. "
                "--api-key sets a key, --host 127.0.0.1 keeps others out."
            )
        try:
            self.run(sockets=self.listeners.sockets)
        finally:
            self.listeners.leave()

    def stop(self) -> None:
        """Stop as soon as what is in flight is answered."""
        self.should_exit = True

    def renew(self, otherwise: signal.Handlers | Callable[[int, FrameType | None], Any] | int | None) -> None:
        """Replace the processes of all replicas, without losing a request. otherwise: what SIGHUP does where there are none."""
        replicated = [engine for engine in self.engines if isinstance(engine, Replicated)]
        if replicated and self.starting.application is not None:
            threading.Thread(target=_restart, args=(replicated,), name="poolhouse-renew", daemon=True).start()
        elif not replicated:
            signal.signal(signal.SIGHUP, otherwise)
            os.kill(os.getpid(), signal.SIGHUP)

    def die(self, error: BaseException) -> None:
        """Stop as on SIGTERM, and let `serve` raise the error. May be called from any thread."""
        self.failure = self.failure or error
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        # Ten times a second.
        dead = [engine.facts.name for engine in self.engines if not engine.alive]
        if dead and self.starting.application is not None:
            self.die(EngineError(f"The engine of {', '.join(dead)} died; the log says why."))
        if self.on_demand is not None and self.on_demand.fatal is not None:
            self.die(self.on_demand.fatal)
        if self.certificates is not None and counter % (10 * _SECONDS_TO_REFRESH) == 0:
            self._refresh(self.certificates)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn cuts connections whose request it has not read yet, and refuses new ones, at once.
        for _ in range(_ROUNDS_TO_ACCEPT):
            await asyncio.sleep(_SECONDS_PER_ROUND)
        self.stopping.begun = True
        end = time.monotonic() + self.settings.shutdown_seconds
        while self.stopping.in_flight and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(_SECONDS_PER_ROUND)
        if self.stopping.in_flight:
            # The clients get a proper 503; uvicorn would cut them off.
            self._refuse_the_rest()
        # Large replies are still on their way to slow readers.
        self.config.timeout_graceful_shutdown = math.ceil(max(0, end - time.monotonic())) + _SECONDS_TO_REFUSE
        self.listeners.leave()
        await super().shutdown(sockets)

    def _load(self) -> ASGIApp:
        self.engines = self.open_engines()
        for engine in self.engines:
            engine.on_fatal(self.die)
            engine.warm_up(self.settings.warmup)
        if self.models_dir is not None:
            self.on_demand = OnDemand.beside(self.engines, self.models_dir, self.settings)
        app = create_app(self.engines, self.settings, on_demand=self.on_demand)
        # Models and modules stay: the garbage collector need not walk them again for every few thousand requests. Nor now:
        # it would find a megabyte, in 0.1 s. `poolhouse.cli.process` turned it off.
        gc.freeze()
        gc.enable()
        return app

    def _print_address(self) -> None:
        names = ", ".join(engine.facts.name for engine in self.engines)
        if self.on_demand is not None:
            count = len(self.on_demand.names)
            names += f"{names and ', and '}{count} model{'s' * (count != 1)} on demand"
        log.info("Application startup complete.")
        say(f"Poolhouse serves {names} on {self._address()}")

    def _address(self) -> str:
        return self.listeners.address("https" if self.config.is_ssl else "http")

    def _refuse_the_rest(self) -> None:
        for engine in self.engines:
            engine.close(0)
        if self.on_demand is not None:
            self.on_demand.refuse_all()
        # A closed engine fails what waits for a batch. What is in one could take longer than anybody waits.
        self.stopping.refuse_all()

    def _refresh(self, certificates: CertificateFiles) -> None:
        try:
            if certificates.refresh():
                log.info("New connections get the renewed certificate.")
        except OSError as error:
            log.error("The renewed certificate cannot be used, the old one stays: %s", error)


def _restart(engines: Sequence[Replicated]) -> None:
    for engine in engines:
        try:
            engine.restart()
        except PoolhouseError as error:
            log.error("SIGHUP: the processes of a model were not renewed, and go on: %s", error)


def _configured(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded_protocol(settings),
        h11_max_incomplete_event_size=settings.max_header_bytes,
        # No route takes WebSockets, and they would bypass the keys.
        ws="none",
        log_config=logging_config(settings),
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        **tls_options(settings),
    )
