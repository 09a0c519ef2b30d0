"""Loaders: the files of `poolhouse run --out DIR` in DuckDB, Polars, Lance, Qdrant and Postgres with pgvector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import polars
    from lance import LanceDataset
    from qdrant_client import QdrantClient


def nearest_by_duckdb(out: str, query: np.ndarray, count: int) -> list[tuple[Any, float]]:
    """The nearest rows: ids and cosines. 384 is the width of the vectors."""
    import duckdb

    return duckdb.execute(
        """
        SELECT id, array_cosine_similarity(embedding::FLOAT[384], $query::FLOAT[384]) AS cosine
        FROM read_parquet($files) ORDER BY cosine DESC LIMIT $count
        """,
        {"query": query.tolist(), "files": f"{out}/*.parquet", "count": count},
    ).fetchall()


def into_polars(out: str) -> polars.DataFrame:
    """A frame whose vectors are of the type Array; `frame["embedding"].to_numpy()` is a matrix."""
    import polars

    return polars.read_parquet(f"{out}/*.parquet")


def into_lance(out: str, target: str) -> LanceDataset:
    """A data set to search in, row by row and never whole in memory."""
    import lance
    from pyarrow import dataset

    return lance.write_dataset(dataset.dataset(sorted(map(str, Path(out).glob("*.parquet")))), target)


def into_qdrant(out: str, ids: Sequence[int], client: QdrantClient, name: str) -> None:
    """A collection of vectors; read from the memory maps of a job with --format npy."""
    from qdrant_client import models

    first = 0
    for path in sorted(Path(out).glob("*.npy")):
        vectors = np.load(path, mmap_mode="r")
        if not first:
            params = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE)
            client.create_collection(name, vectors_config=params)
        client.upload_collection(name, vectors=vectors, ids=ids[first : first + len(vectors)], parallel=1)
        first += len(vectors)


def for_pgvector(out: str, target: str) -> None:
    r"""A file for psql: \copy items (id, embedding) FROM 'items.bin' WITH (FORMAT binary), of bigint and vector."""
    import pyarrow.parquet as pq

    with Path(target).open("wb") as file:
        file.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
        for path in sorted(Path(out).glob("*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(columns=["id", "embedding"]):
                vectors = batch["embedding"].flatten().to_numpy().reshape(len(batch), -1)
                width = vectors.shape[1]
                # Big-endian: the number of fields, then the bytes of each before it; a vector begins with its width.
                row = [("fields", ">i2"), ("id_bytes", ">i4"), ("id", ">i8"), ("bytes", ">i4"), ("width", ">i2")]
                rows = np.zeros(len(batch), [*row, ("zero", ">i2"), ("vector", ">f4", width)])
                rows["fields"], rows["id_bytes"], rows["bytes"], rows["width"] = 2, 8, 4 + 4 * width, width
                rows["id"], rows["vector"] = batch["id"].to_numpy(), vectors
                file.write(rows.tobytes())
        file.write(b"\xff\xff")
