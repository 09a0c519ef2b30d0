"""A function of Spark: from spark_udf import embed; frame.withColumn("embedding", embed("text"))."""

import os

from pyspark.ml.functions import predict_batch_udf
from pyspark.sql.types import ArrayType, FloatType

from poolhouse.batch import Embedder

embedder = Embedder(os.environ.get("POOLHOUSE_MODEL"), overflow="truncate")
embed = predict_batch_udf(lambda: embedder, return_type=ArrayType(FloatType()), batch_size=1024)
