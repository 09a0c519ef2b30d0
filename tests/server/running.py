"""The server in a process of its own, around engines without a model: real sockets and signals, no waiting for torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

# load: statements that make `engines`. h11: whether the parser in Python serves, as without the extra `speed`.
_SCRIPT = """
import json, sys, threading, time
if {h11}:
    sys.modules["httptools"] = None
from poolhouse.errors import PoolhouseError
from poolhouse.server.process.run import serve
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine

def open_engines():
    {load}
    return engines

try:
    serve(open_engines, ServerSettings.parse(**json.loads(sys.argv[1])))
except (PoolhouseError, OSError) as error:
    sys.exit(f"poolhouse: {{error}}")
"""


class Running:
    """A server process; `url` is where it will answer."""

    def __init__(
        self,
        load: str = "engines = [FakeEngine('fake')]",
        *,
        stdin: bool = False,
        h11: bool = False,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
        **settings: Any,
    ) -> None:
        settings = {"host": "127.0.0.1", "port": free_port(), **settings}
        scheme = "https" if "ssl_certfile" in settings else "http"
        self.url = f"{scheme}://127.0.0.1:{settings['port']}"
        self.port: int = settings["port"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT.format(load=load, h11=h11), json.dumps(settings)],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True,
        )  # fmt: skip

    def ready(self) -> Running:
        """Wait until it says that it serves."""
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert self.said.startswith("Poolhouse serves"), self.process.communicate()[1]
        return self

    def listening(self) -> Running:
        """Wait until its port answers, loaded or not."""
        for _ in range(1200):
            try:
                httpx.get(f"{self.url}/health/live", trust_env=False)
                return self
            except httpx.TransportError:
                assert self.process.poll() is None, self.process.communicate()
                time.sleep(0.05)
        raise AssertionError("Nothing listens.")

    def stop(self) -> tuple[int, str]:
        """Exit status and what was logged."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        log = self.process.communicate(timeout=60)[1]
        return self.process.returncode, log


@contextmanager
def running(*, h11: bool = False, **settings: Any) -> Iterator[Running]:
    """A ready server, which ends well."""
    server = Running(h11=h11, **settings).ready()
    try:
        yield server
    finally:
        status, log = server.stop()
    assert status == 0, log
    assert "Traceback" not in log


@contextmanager
def served(home: Path, *words: str) -> Iterator[httpx.Client]:
    """A client of `poolhouse serve` with these words, run in `home`, so that models may lie there by their names."""
    port = str(free_port())
    process = subprocess.Popen(
        [sys.executable, "-m", "poolhouse.cli", "serve", *words, "--host", "127.0.0.1", "--port", port,
         "--log-level", "warning"],
        cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Poolhouse serves"), process.communicate()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield client
    finally:
        process.terminate()
        log = process.communicate(timeout=60)[1]
    assert process.returncode == 0, log


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
