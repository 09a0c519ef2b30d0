"""Dask: python dask_job.py IN OUT MODEL [SCHEDULER]. Called again after a crash, it goes on with what is not written."""

import sys
from pathlib import Path

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.distributed import Client

from poolhouse.batch import Embedder


def main(source: str, out: str, model: str, scheduler: str | None = None) -> None:
    left = [path for path in sorted(Path(source).glob("*.parquet")) if not is_whole(Path(out, path.name))]
    if not left:
        return
    # A process per model: the threads of a worker share one.
    with Client(scheduler) if scheduler else Client(n_workers=1, dashboard_address=None):
        rows = dd.from_map(pd.read_parquet, left)
        vectors = rows.map_partitions(
            Embedder(model, overflow="truncate"), meta=dict(rows.dtypes) | {"embedding": object}
        )
        vectors.to_parquet(
            out,
            name_function=lambda number: left[number].name,
            schema=pq.read_schema(left[0]).append(pa.field("embedding", pa.list_(pa.float32()))),
            write_index=False,
        )


def is_whole(path: Path) -> bool:
    """A file that was being written has no footer yet."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
