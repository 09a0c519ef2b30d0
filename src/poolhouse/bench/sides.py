"""Sides: what is measured, each in a process of its own that lives through the rounds and runs commands when it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from poolhouse.errors import ConfigError, EngineError

US = "Poolhouse"
# What a command measured, by name.
Result = dict[str, Any]
# What a side can be asked to do, by name.
Commands = Mapping[str, Callable[..., Result]]

# Libraries of peers by the names that reports have, each with the module that must be importable.
LIBRARIES = {
    "sentence-transformers": "sentence_transformers",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "PyLate": "pylate",
    "colpali-engine": "colpali_engine",
    "Infinity": "infinity_emb",
    "vLLM": "vllm",
}
_SCRIPT = Path(__file__).with_name("peers.py")


class SideProcess:
    """One side in a process of its own.

    command: what runs it. cores: the CPU cores that it may use; none leaves it all of ours.
    start_seconds: how long it took from the start of the process to its first answer.

    Raises:
        EngineError: it ended before it was ready, with the last line that it wrote.
    """

    def __init__(self, side: str, command: Sequence[str], cores: Sequence[int] | None = None) -> None:
        self.side = side
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        started = time.perf_counter()
        self.process = subprocess.Popen(  # noqa: S603 - our own module, or one that the user names
            [*pinned(cores), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
            text=True,
        )
        try:
            self.ready = self._result()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started

    def do(self, command: str, **arguments: object) -> Result:
        """Run a command there and wait for its result.

        Raises:
            EngineError: the command failed, or the process died.
        """
        assert self.process.stdin is not None
        try:
            print(json.dumps({"do": command, **arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self._died()
        return self._result()

    def close(self) -> None:
        """Let it end, and wait for it."""
        try:
            self.process.communicate(timeout=30)
        except (subprocess.TimeoutExpired, ValueError, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        self._errors.close()

    def _result(self) -> Result:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._died()
        result: Result = json.loads(line)
        if "failed" in result:
            raise EngineError(f"{self.side}: {result['failed']}")
        return result

    def _died(self) -> None:
        self.process.kill()
        self.process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        raise EngineError(
            f"{self.side} ended with status {self.process.returncode}: {said[-1] if said else 'no words'}"
        )


def pinned(cores: Sequence[int] | None) -> list[str]:
    """What stands before a command so that it runs on these cores alone, its libraries' threads included."""
    if cores is None:
        return []
    code = "import os, sys; os.sched_setaffinity(0, eval(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"
    return [sys.executable, "-S", "-c", code, repr(list(cores))]


def our_side(model: str, **options: object) -> list[str]:
    """The command of our side: `poolhouse.bench.ours` with the options of `LLM`, and what else it reads."""
    return [sys.executable, "-m", "poolhouse.bench.ours", json.dumps({"model": model, **options})]


def peer_side(python: Path, library: str, model: str, **options: object) -> list[str]:
    """The command of a peer: the script of peers, run by the Python of their environment."""
    spec = {"library": library, "model": model, **options}
    return [str(python), "-P", str(_SCRIPT), json.dumps(spec)]


def find_python(peers: Path | None) -> Path:
    """The Python of the environment with peers: a Python, or the folder of its environment; none is our own.

    Raises:
        ConfigError: there is none.
    """
    if peers is None:
        return Path(sys.executable)
    for path in (peers, peers / "bin" / "python", peers / "Scripts" / "python.exe"):
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise ConfigError(f"--peers is {str(peers)!r}; it must be a Python, or the folder of an environment that has one.")


def installed(python: Path) -> dict[str, str | None]:
    """The version of each library that this Python can import, by its name in reports; None where it cannot.

    Raises:
        ConfigError: it is no Python that runs.
    """
    command = [str(python), "-P", str(_SCRIPT), json.dumps({"installed": LIBRARIES})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)  # noqa: S603
        found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ConfigError(f"--peers names {str(python)!r}, which does not run as a Python: {error}") from None
    return found


def serve_commands(start: Callable[[], Commands]) -> None:
    """Run commands of standard input, a JSON object a line, until it ends."""
    # Libraries print to standard output now and then; the results keep a channel of their own.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(work: Callable[[], object]) -> bool:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - whatever a library raises is the answer
            result = {"failed": str(error).splitlines()[0] if str(error) else repr(error)}
        print(json.dumps(result), file=results, flush=True)
        return isinstance(result, dict) and "failed" not in result

    side: dict[str, Callable[..., Result]] = {}

    def begin() -> Result:
        side.update(start())
        return {"ready": True}

    if not answer(begin):
        return
    for line in sys.stdin:
        command = json.loads(line)
        answer(lambda command=command: side[command.pop("do")](**command))  # type: ignore[misc]


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def milliseconds(call: Callable[[], object], runs: int, seconds: float) -> list[float]:
    """How long each of `runs` calls takes; ends early after so many seconds, and behind five calls at least."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < runs and (len(times) < 5 or time.perf_counter() < deadline):
        times.append(1000 * seconds_of(call))
    return times
