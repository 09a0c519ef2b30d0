"""Daft: python daft_job.py IN OUT MODEL [GPUS]."""

import sys

import daft
from daft import DataType

from poolhouse.batch import Embedder

source, out, model, gpus = (*sys.argv[1:], "0")[:4]
WIDTH = 384  # of the model's vectors


@daft.cls(gpus=min(1, int(gpus)), max_concurrency=max(1, int(gpus)))
class Embed:
    def __init__(self) -> None:
        self.embedder = Embedder(model, overflow="truncate")

    @daft.method.batch(return_dtype=DataType.embedding(DataType.float32(), WIDTH), batch_size=1024)
    def __call__(self, text: daft.Series):
        return self.embedder(text.to_arrow())


daft.read_parquet(source).with_column("embedding", Embed()(daft.col("text"))).write_parquet(out)
