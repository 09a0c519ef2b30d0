"""Spark: spark-submit spark_job.py IN OUT MODEL [FILES]. Called again after a crash, it goes on with what is not written."""

import sys

from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, FloatType, StructType

from poolhouse.batch import Embedder

source, out, model, files_at_once = (*sys.argv[1:], "64")[:4]  # so many files are lost by a crash
embedder = Embedder(model, overflow="truncate", lists="variable")
spark = SparkSession.builder.getOrCreate()
try:
    written = spark.read.parquet(out).select("id")
except AnalysisException:  # nothing yet
    written = None
files = sorted(spark.read.parquet(source).inputFiles())
for first in range(0, len(files), int(files_at_once)):
    rows = spark.read.parquet(*files[first : first + int(files_at_once)])
    if written is not None:
        rows = rows.join(written, "id", "left_anti")
    schema = StructType([*rows.schema]).add("embedding", ArrayType(FloatType()))
    rows.mapInArrow(embedder.map, schema).write.mode("append").parquet(out)
