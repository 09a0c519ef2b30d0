"""Dialects: each turns its bodies into requests and answers into its bodies. A new one is a file and a line here."""

from __future__ import annotations

from poolhouse.server.dialects import azure, health, openai, tei, voyage
from poolhouse.server.dialects.vllm import classify, pooling, score, tokenize
from poolhouse.server.routing import Dialect

# Of routes at one path and method, the first counts.
DIALECTS: tuple[Dialect, ...] = (
    health.DIALECT,
    openai.DIALECT,
    pooling.DIALECT,
    classify.DIALECT,
    score.DIALECT,
    tokenize.DIALECT,
    tei.OWN,
    azure.DIALECT,
    *tei.PREFIXED,
    voyage.DIALECT,
)
