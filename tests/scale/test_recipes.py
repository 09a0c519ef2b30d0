"""Embedding by Ray, Spark, Daft and Dask: each row once with the vector of `LLM`, whatever is killed on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.scale.conftest import FILES, ROWS, TOLERANCE, Script, check, start, text

# Clusters are started, killed and started again.
pytestmark = pytest.mark.timeout(900)

Vector = Callable[[int], np.ndarray]
SMALL = [*range(100), *range(ROWS, ROWS + 100)]


def whole(out: Path) -> list[Path]:
    return [path for path in out.glob("*.parquet") if path.stat().st_size]


# Ray's checkpoint needs three CPUs, of which it counts more here than there are.
RAY = """
import runpy, sys
import ray
ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ray_data_goes_on_where_its_actor_and_then_itself_was_killed(
    corpus: Path, model: str, vector: Vector, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["-c", RAY, "examples/scale/ray_data.py", str(corpus), str(out), model]
    with Script(arguments, tmp_path / "first.log") as script:
        script.until(lambda: whole(out))
        (actor,) = script.workers("MapWorker(MapBatches(Embedder))")
        actor.kill()
        before = len(whole(out))
        script.until(lambda: len(whole(out)) > before)
        assert len(whole(out)) < FILES, "it was done before it was killed"
    with Script(arguments, tmp_path / "second.log") as script:
        script.end()
    table = check(out, list(range(FILES * ROWS)), vector)
    assert not any(table["cut"].to_pylist())
    files = whole(out)
    with Script(arguments, tmp_path / "third.log") as script:
        script.end()
    assert whole(out) == files


def test_spark_goes_on_where_it_was_killed(corpus: Path, model: str, vector: Vector, tmp_path: Path) -> None:
    out, arguments = tmp_path / "out", ("spark_job.py", corpus, tmp_path / "out", model, 2)
    with start(tmp_path / "first.log", *arguments) as script:
        script.until(lambda: whole(out))
    first = {path: path.stat().st_mtime_ns for path in whole(out)}
    with start(tmp_path / "second.log", *arguments) as script:
        script.end()
    check(out, list(range(FILES * ROWS)), vector)
    after = {path: path.stat().st_mtime_ns for path in whole(out)}
    assert first.items() < after.items()


UDF = """
import sys
sys.path.insert(0, "examples/scale")
from pyspark.sql import SparkSession
from spark_udf import embed
frame = SparkSession.builder.getOrCreate().read.parquet(sys.argv[1])
frame.withColumn("embedding", embed("text")).write.parquet(sys.argv[2])
"""


def test_spark_has_it_as_a_function(small_corpus: Path, model: str, vector: Vector, tmp_path: Path) -> None:
    arguments = ["-c", UDF, str(small_corpus), str(tmp_path / "out")]
    with Script(arguments, tmp_path / "log", POOLHOUSE_MODEL=model) as script:
        script.end()
    check(tmp_path / "out", SMALL, vector)


def test_daft_runs_it_as_a_class(small_corpus: Path, model: str, vector: Vector, tmp_path: Path) -> None:
    with start(tmp_path / "log", "daft_job.py", small_corpus, tmp_path / "out", model) as script:
        script.end()
    check(tmp_path / "out", SMALL, vector)


def test_dask_goes_on_with_files_that_are_not_whole(
    small_corpus: Path, model: str, vector: Vector, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for torn in (False, True):
        if torn:
            before = (out / "0.parquet").stat().st_mtime_ns
            content = (out / "1.parquet").read_bytes()
            (out / "1.parquet").write_bytes(content[: len(content) // 2])
        with start(tmp_path / "log", "dask_job.py", small_corpus, out, model) as script:
            script.end()
        check(out, SMALL, vector)
    assert (out / "0.parquet").stat().st_mtime_ns == before


SERVE = """
import sys
sys.path.insert(0, "examples/scale")
import ray
from ray import serve
ray.init(address="local", num_cpus=2, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
from ray_serve import app
serve.run(app)
print("All replicas are there.", flush=True)
sys.stdin.read()
"""


def test_ray_serve_answers_as_the_server_does_and_replaces_a_killed_replica(
    model: str, vector: Vector, free_port: int, tmp_path: Path
) -> None:
    def ask(body: object) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{free_port}/v1/embeddings", json={"input": body}, timeout=60)

    with Script(["-c", SERVE, str(free_port)], tmp_path / "log", POOLHOUSE_MODEL=model) as script:
        script.until(lambda: "All replicas are there." in script.said())
        for number in range(8):
            found = ask(text(number)).json()["data"][0]["embedding"]
            assert np.abs(np.array(found) - vector(number)).max() < TOLERANCE
        assert ask(3).status_code == 400
        first, second = script.workers("ServeReplica:default:Poolhouse")
        first.kill()
        script.until(lambda: ask(text(1)).status_code == 200)
        script.until(lambda: {one.pid for one in script.workers("ServeReplica:default")} - {first.pid, second.pid})
