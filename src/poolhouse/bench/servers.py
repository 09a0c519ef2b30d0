"""Servers: ours and those of peers, started on a free port, asked over one kept connection, and stopped for good."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from poolhouse.bench.measure import Bench, llm_options
from poolhouse.bench.sides import US, Result, milliseconds, pinned
from poolhouse.errors import EngineError

_SECONDS_TO_START = 400
NAME = "measured"


@dataclass(frozen=True, slots=True)
class Service:
    """A server that can be started.

    command: without its port, which comes last. path: of its embeddings. backend: their name among those of `load.py`.
    """

    name: str
    command: tuple[str, ...]
    backend: str = "openai-embeddings"
    path: str = "/v1/embeddings"


class ServerProcess:
    """A server in a process group of its own. start_seconds: from its start to its first vector.

    Raises:
        EngineError: it ended, or took too long.
    """

    def __init__(self, service: Service, cores: Sequence[int] | None = None) -> None:
        self.service = service
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        started = time.perf_counter()
        self.process = subprocess.Popen(  # noqa: S603 - our own command, or one that the user names
            [*pinned(cores), *service.command, str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        self._connection: http.client.HTTPConnection | None = None
        try:
            self._wait(started)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def do(self, command: str, **arguments: object) -> Result:
        """`latency` of one text, as `SideProcess.do` answers it."""
        assert command == "latency", command
        text, runs, seconds = (arguments[name] for name in ("text", "runs", "seconds"))
        assert isinstance(runs, int)
        assert isinstance(seconds, int | float)
        return {"ms": milliseconds(lambda: self.ask(str(text)), runs, seconds)}

    def ask(self, text: str) -> None:
        """One text over the kept connection.

        Raises:
            EngineError: no answer, or another status than 200.
        """
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = json.dumps({"input": [text], "model": NAME})
        try:
            self._connection.request("POST", self.service.path, body, {"Content-Type": "application/json"})
            reply = self._connection.getresponse()
            said = reply.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            self._connection = None
            raise EngineError(f"{self.service.name} did not answer: {error!r}") from None
        if reply.status != 200:
            raise EngineError(f"{self.service.name} answered {reply.status}: {said[:200]!r}")

    def close(self) -> None:
        """Stop it, and whatever it started."""
        if self._connection is not None:
            self._connection.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        # Workers that outlived their server would slow the next one.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _wait(self, started: float) -> None:
        while True:
            if self.process.poll() is not None:
                self._log.seek(0)
                said = self._log.read().decode(errors="replace").strip().splitlines()
                raise EngineError(f"{self.service.name} did not start: {said[-1] if said else 'no words'}")
            if time.perf_counter() - started > _SECONDS_TO_START:
                raise EngineError(f"{self.service.name} did not start within {_SECONDS_TO_START} s")
            try:
                self.ask("warm")
                return
            except EngineError:
                time.sleep(0.02)


def our_server(model: str, dtype: str, command: Sequence[str] = (), name: str = US) -> Service:
    """Our own. command: what stands before `serve`; by default this very version."""
    options = [f"--{option}={value}" for option, value in llm_options(dtype).items()]
    start = command or [sys.executable, "-m", "poolhouse.cli"]
    served = ["--served-model-name", NAME, "--host", "127.0.0.1", "--overflow", "truncate"]
    return Service(name, (*start, "serve", model, *options, *served, "--port"))


def peer_servers(bench: Bench, model: str, dtype: str) -> list[Service]:
    """The servers of peers that are installed, for a type that they have."""
    found = []
    if "Infinity" in bench.libraries and dtype != "int8":
        python, version = bench.libraries["Infinity"]
        options = ["--model-id", model, "--served-model-name", NAME, "--device", "cpu", "--engine", "torch"]
        command = [str(python.with_name("infinity_emb")), "v2", *options, "--dtype", dtype, "--port"]
        found.append(Service(f"Infinity {version}", tuple(command), "infinity-embeddings", "/embeddings"))
    if "vLLM" in bench.libraries and dtype != "int8":
        python, version = bench.libraries["vLLM"]
        # On CPUs this is a share of the main memory, and 0.92 of it is seldom free.
        options = ["--runner", "pooling", "--dtype", dtype, "--gpu-memory-utilization", "0.3", "--host", "127.0.0.1"]
        command = [str(python.with_name("vllm")), "serve", model, *options, "--served-model-name", NAME, "--port"]
        found.append(Service(f"vLLM {version}", tuple(command)))
    router = shutil.which("text-embeddings-router")
    if router is not None and dtype == "float32":
        options = ["--model-id", model, "--dtype", "float32", "--hostname", "127.0.0.1", "--auto-truncate"]
        found.append(Service("TEI", (router, *options, "--port")))
    return found


def missing_servers(bench: Bench) -> list[str]:
    """A line that names the servers of peers that are not there."""
    absent = [name for name in ("Infinity", "vLLM") if name not in bench.libraries]
    if shutil.which("text-embeddings-router") is None:
        absent.append("TEI (text-embeddings-router on the PATH)")
    return [f"Not installed, so not compared: {', '.join(absent)}."] if absent else []


class BusyLoops:
    """So many processes that keep a core busy each, while the block runs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> BusyLoops:
        # One ends by itself when this process is gone and its input ends: a thread of it waits for that.
        code = (
            "import os, sys, threading\n"
            "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n"
            "while True: pass"
        )
        for _ in range(self.count):
            command = [sys.executable, "-S", "-c", code]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))  # noqa: S603
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
