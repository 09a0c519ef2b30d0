"""Dialects: each turns its bodies into requests and answers into its bodies. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter

from poolhouse.server.dialects import (
    azure,
    by_body,
    cohere,
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
from poolhouse.server.engines import Serving
from poolhouse.server.wire.contract import Contracts
from poolhouse.server.wire.errors import Shape

# At paths of their own, or that several share and tell apart by the body.
_DIALECTS = (
    *(health, openai, pooling, classify, score, by_body, tokenize, tei, cohere, jina, nvidia),
    *(ollama, llama_cpp, azure, weaviate, sie),
)
# Whole under a prefix, with their own defaults and errors.
_PREFIXED = {
    "/tei": tei,
    "/cohere": cohere,
    "/jina": jina,
    "/voyage": voyage,
    "/infinity": infinity,
    "/weaviate": weaviate,
}
# Paths that, with all beneath, belong to one dialect.
_SHAPES: Mapping[str, Shape] = {
    **{prefix: dialect.shape for prefix, dialect in _PREFIXED.items()},
    **dict.fromkeys(("/embedding", "/reranking", "/v1/reranking"), llama_cpp.shape),
    # /v1/score itself is vLLM's.
    **dict.fromkeys(("/v1/encode", "/v1/score/"), sie.shape),
    "/api": ollama.shape,
    "/openai": azure.shape,
    "/vectors": weaviate.shape,
}


def routers(serving: Serving) -> list[APIRouter]:
    """The routes of every dialect over these engines."""
    return [
        *(dialect.router(serving) for dialect in _DIALECTS),
        by_body.rerank_router(serving),
        *(dialect.prefixed_router(serving) for dialect in _PREFIXED.values()),
    ]


def shapes() -> Mapping[str, Shape]:
    """How errors look at each of these paths, and beneath it."""
    return _SHAPES


def contracts() -> Contracts:
    """What every path answers; drawn in when somebody asks."""
    from poolhouse.server.dialects import cohere, health, infinity, jina, nvidia, openai, voyage
    from poolhouse.server.dialects.tei import replies as tei_replies
    from poolhouse.server.dialects.vllm import replies

    told = (
        *(health, openai, replies, tei_replies, cohere, jina, nvidia),
        *(voyage, infinity, ollama, llama_cpp, azure, weaviate, sie),
    )
    return {path: contract for replies in told for path, contract in replies.CONTRACTS.items()}
