"""Dialects: each turns its bodies into requests and answers into its bodies. A new one is a file and a line here."""

from __future__ import annotations

from fastapi import APIRouter

from poolhouse.server.dialects import (
    classify,
    cohere,
    health,
    infinity,
    invocations,
    jina,
    nvidia,
    openai,
    pooling,
    rerank,
    score,
    tei,
    voyage,
)
from poolhouse.server.serving import Serving

# At paths of their own, or that several share and tell apart by the body.
_DIALECTS = (health, openai, pooling, classify, score, rerank, tei, cohere, jina, nvidia, invocations)
# Whole under a prefix, with their own defaults and errors.
_PREFIXED = (tei, cohere, jina, voyage, infinity)


def routers(serving: Serving) -> list[APIRouter]:
    """The routes of every dialect over these engines."""
    return [
        *(dialect.router(serving) for dialect in _DIALECTS),
        *(dialect.prefixed_router(serving) for dialect in _PREFIXED),
    ]
