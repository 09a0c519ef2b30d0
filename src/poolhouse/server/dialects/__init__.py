"""Dialects: each turns its bodies into requests, and answers into its replies; a new one is a file and a line."""

from __future__ import annotations

from poolhouse.server.dialects import (
    azure,
    by_body,
    cohere,
    extract,
    health,
    infinity,
    jina,
    llama_cpp,
    nvidia,
    ollama,
    openai,
    sie,
    tei,
    voyage,
    weaviate,
)
from poolhouse.server.dialects.vllm import classify, pooling, score, tokenize
from poolhouse.server.routing import Dialect

# Of routes at one path and method, the first counts.
DIALECTS: tuple[Dialect, ...] = (
    health.DIALECT,
    openai.DIALECT,
    pooling.DIALECT,
    classify.DIALECT,
    *extract.DIALECTS,
    score.DIALECT,
    by_body.INVOCATIONS,
    by_body.RERANK,
    tokenize.DIALECT,
    tei.OWN,
    *tei.PREFIXED,
    *cohere.DIALECTS,
    *jina.DIALECTS,
    nvidia.DIALECT,
    *voyage.DIALECTS,
    infinity.DIALECT,
    ollama.DIALECT,
    *llama_cpp.DIALECTS,
    azure.DIALECT,
    *weaviate.DIALECTS,
    sie.DIALECT,
)
