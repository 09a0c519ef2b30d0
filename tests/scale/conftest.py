"""Recipes of docs/scale.md under other people's engines. `make test-scale` makes their environment; `make test` leaves
them out."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from poolhouse import LLM
from poolhouse.models.files.hub import embedded_model
from tests.docs.pages import ROOT

LIBRARIES = ("ray", "pyspark", "daft", "dask", "distributed", "duckdb", "polars", "lance", "qdrant_client", "pgvector")
FILES, ROWS = 4, 1024
# Sums of a pack come in another order than those of another pack, in float32.
TOLERANCE = 1e-5

missing = [name for name in LIBRARIES if find_spec(name) is None]
if missing:
    raise pytest.UsageError(f"tests/scale needs {', '.join(missing)}: make test-scale installs them and runs it.")
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    raise pytest.UsageError("tests/scale needs Java, 17 or newer, for Spark: a `java` in PATH, or JAVA_HOME.")


def text(number: int) -> str:
    return f"Row {number} of a corpus is about topic {number % 97}."


@pytest.fixture(scope="session")
def model() -> str:
    return str(embedded_model())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of rows with ids and texts."""
    folder = tmp_path_factory.mktemp("corpus")
    for file in range(FILES):
        ids = range(file * ROWS, (file + 1) * ROWS)
        pq.write_table(pa.table({"id": ids, "text": [text(number) for number in ids]}), folder / f"{file}.parquet")
    return folder


@pytest.fixture(scope="session")
def small_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of a few rows."""
    folder = tmp_path_factory.mktemp("small")
    for file in range(2):
        pq.write_table(pq.read_table(corpus / f"{file}.parquet").slice(0, 100), folder / f"{file}.parquet")
    return folder


@pytest.fixture(scope="session")
def vector(model: str) -> Callable[[int], np.ndarray]:
    """The vector of a row, by `LLM`."""
    llm = LLM(model)
    return lambda number: llm.embed_array([text(number)])[0]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def environment() -> dict[str, str]:
    """That of a script which finds this Python, two cores and no network."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_SUBMIT_ARGS": "--master local[2] --conf spark.ui.enabled=false pyspark-shell",
        "RAY_USAGE_STATS_ENABLED": "0",
        # The older reader makes a block of each small file, and so several of this corpus.
        "RAY_DATA_USE_DATASOURCE_V2": "0",
    }


def start(log: Path, name: str, *arguments: object) -> Script:
    """A script of examples/scale, started as users do."""
    return Script([str(ROOT / "examples" / "scale" / name), *map(str, arguments)], log)


class Script:
    """A Python process, and what it says, in a file: a pipe that nobody reads would hold it up."""

    def __init__(self, arguments: list[str], log: Path, **further: str) -> None:
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment() | further,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Wait for its end, which must be a good one."""
        self.process.communicate(timeout=400)
        assert self.process.returncode == 0, self.said()[-4000:]

    def until(self, done: Callable[[], object], seconds: float = 300) -> None:
        """Wait for something, as long as the process runs."""
        end = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None, f"it ended too early: {self.said()[-3000:]}"
            assert time.monotonic() < end, self.said()[-3000:]
            time.sleep(0.02)

    def workers(self, name: str) -> list[psutil.Process]:
        """Its running descendants whose command line or title has this."""
        found = []
        for one in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if name in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it, and all that it started."""
        try:
            started = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            started = []
        self.process.kill()
        for one in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.communicate()
        psutil.wait_procs(started, timeout=30)


def check(out: Path, ids: list[int], vector: Callable[[int], np.ndarray]) -> pa.Table:
    """Each row is there once, with the vector of `LLM`."""
    files = [str(path) for path in sorted(out.glob("*.parquet")) if path.stat().st_size]
    table = pyarrow.dataset.dataset(files).to_table()
    assert sorted(table["id"].to_pylist()) == sorted(ids)
    for place in range(0, len(ids), max(1, len(ids) // 7)):
        row = table.slice(place, 1).to_pylist()[0]
        assert row["text"] == text(row["id"])
        assert np.abs(np.array(row["embedding"], np.float32) - vector(row["id"])).max() < TOLERANCE
    return table
