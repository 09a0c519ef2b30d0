"""Files of a job in the databases that people load them into: the same neighbours as by numpy."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pgvector import Vector
from qdrant_client import QdrantClient

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def loaders() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loaders", ROOT / "examples" / "scale" / "loaders.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line writes, in several files."""
    out = tmp_path_factory.mktemp("job")
    for form, options in (("parquet", ["--id", "id"]), ("npy", [])):
        command = [sys.executable, "-m", "poolhouse.cli", "embed", str(small_corpus), "--out", str(out / form)]
        subprocess.run([*command, "--format", form, "--shard-rows", "70", *options], check=True, capture_output=True)
        assert len(list((out / form).glob(f"*.{form}"))) > 1
    return out


@pytest.fixture(scope="module")
def query(vector: Callable[[int], np.ndarray]) -> np.ndarray:
    # No two rows are as near as each other.
    return 2 * vector(5) + vector(1030)


@pytest.fixture(scope="module")
def rows(out: Path) -> tuple[list[int], np.ndarray]:
    """Ids and vectors, as pyarrow alone reads them."""
    files = sorted((out / "parquet").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(path, columns=["id", "embedding"]) for path in files])
    return table["id"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32)


@pytest.fixture(scope="module")
def nearest(rows: tuple[list[int], np.ndarray], query: np.ndarray) -> list[tuple[int, float]]:
    """Ids and cosines of the five nearest rows, by numpy."""
    ids, vectors = rows
    cosines = vectors @ query / np.linalg.norm(query)
    return [(ids[place], float(cosines[place])) for place in np.argsort(-cosines)[:5]]


def same(found: list[tuple[int, float]], nearest: list[tuple[int, float]]) -> bool:
    # Cosines of float32 in another order.
    return [one for one, _ in found] == [one for one, _ in nearest] and bool(
        np.abs(np.array([cosine for _, cosine in found]) - [cosine for _, cosine in nearest]).max() < 1e-5
    )


def test_duckdb_compares_vectors_as_arrays(
    loaders: ModuleType, out: Path, query: np.ndarray, nearest: list[tuple[int, float]]
) -> None:
    assert same(loaders.nearest_by_duckdb(str(out / "parquet"), query, 5), nearest)


def test_polars_reads_vectors_as_arrays(loaders: ModuleType, out: Path, rows: tuple[list[int], np.ndarray]) -> None:
    import polars

    frame = loaders.into_polars(str(out / "parquet"))
    assert frame.schema["embedding"] == polars.Array(polars.Float32, 384)
    assert frame["id"].to_list() == rows[0]
    assert np.array_equal(frame["embedding"].to_numpy(), rows[1])


def test_lance_searches_what_it_is_given(
    loaders: ModuleType, out: Path, query: np.ndarray, nearest: list[tuple[int, float]], tmp_path: Path
) -> None:
    dataset = loaders.into_lance(str(out / "parquet"), str(tmp_path / "items.lance"))
    assert dataset.count_rows() == 200
    search = {"column": "embedding", "q": query, "k": 5, "metric": "cosine"}
    found = dataset.to_table(columns=["id", "_distance"], nearest=search)
    cosines = [1 - distance for distance in found["_distance"].to_pylist()]
    assert same(list(zip(found["id"].to_pylist(), cosines, strict=True)), nearest)


def test_qdrant_uploads_memory_maps(
    loaders: ModuleType,
    out: Path,
    rows: tuple[list[int], np.ndarray],
    query: np.ndarray,
    nearest: list[tuple[int, float]],
) -> None:
    client = QdrantClient(":memory:")
    loaders.into_qdrant(str(out / "npy"), rows[0], client, "items")
    assert client.count("items").count == 200
    points = client.query_points("items", query=query.tolist(), limit=5).points
    assert same([(point.id, point.score) for point in points], nearest)


def test_a_file_for_pgvector_is_what_its_own_reader_reads(
    loaders: ModuleType, out: Path, rows: tuple[list[int], np.ndarray], tmp_path: Path
) -> None:
    """The framing by Postgres' manual of COPY, the vectors by pgvector's package."""
    loaders.for_pgvector(str(out / "parquet"), str(tmp_path / "items.bin"))
    content = (tmp_path / "items.bin").read_bytes()
    assert content[:11] == b"PGCOPY\n\xff\r\n\0"
    flags, extension = struct.unpack_from(">ii", content, 11)
    assert (flags, extension) == (0, 0)
    place, ids, vectors = 19, [], []
    while (fields := struct.unpack_from(">h", content, place)[0]) != -1:
        assert fields == 2
        values = []
        place += 2
        for _ in range(fields):
            (size,) = struct.unpack_from(">i", content, place)
            values.append(content[place + 4 : place + 4 + size])
            place += 4 + size
        ids.append(int.from_bytes(values[0], "big", signed=True))
        vectors.append(Vector.from_binary(values[1]).to_numpy())
    assert place + 2 == len(content)
    assert ids == rows[0]
    assert np.array_equal(np.array(vectors, np.float32), rows[1])
