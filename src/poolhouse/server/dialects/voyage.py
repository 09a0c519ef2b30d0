"""Voyage's embeddings and rerank under /voyage; its rerank at /v1/rerank too, told by `top_k`.

Source: Voyage's OpenAPI description.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from poolhouse.server.dialects import _hosted, _replies
from poolhouse.server.dialects._fields import Many, body_schema
from poolhouse.server.dialects._hosted import Wish
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.contract import Contract, Contracts, Cut, Errors, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json, speak
from poolhouse.vectors.precision import Precision

# Fields of Voyage's rerank that no other dialect at /v1/rerank has.
OWN_RERANK_FIELDS = frozenset({"top_k", "truncation"})


class EmbeddingFields(BaseModel):
    """The body of POST /voyage/v1/embeddings."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    input: str | Many[str]
    input_type: str | None = Field(None, description="query, document, or the name of a prompt.")
    truncation: bool = True
    output_dimension: int | None = None
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] = "float"
    encoding_format: Literal["base64"] | None = None


class RerankFields(BaseModel):
    """The body of POST /voyage/v1/rerank."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    query: str
    documents: Many[str]
    top_k: int | None = Field(None, ge=1)
    return_documents: bool = False
    truncation: bool = True


def prefixed_router(serving: Serving) -> APIRouter:
    """All of Voyage under /voyage."""
    routes = direct_router("voyage", "/voyage")

    @routes.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingFields))
    async def embeddings(http: Request) -> Response:
        """One vector per input."""
        speak(http, shape)
        return await _embeddings(serving, http, await serving.read(http, EmbeddingFields))

    @routes.post("/v1/rerank", openapi_extra=body_schema(RerankFields))
    async def rerank(http: Request) -> Response:
        """Documents by how well they answer a query, best first, as `data`."""
        speak(http, shape)
        return await answer_rerank(serving, http, await serving.read(http, RerankFields))

    return routes


async def _embeddings(serving: Serving, http: Request, fields: EmbeddingFields) -> Response:
    engine = serving.engine(fields.model)
    texts = [fields.input] if isinstance(fields.input, str) else fields.input
    wish = Wish(fields.input_type, fields.output_dimension, truncate=None if fields.truncation else "NONE")
    answers = await _hosted.embed(serving, http, engine, texts, wish)

    def render() -> bytes:
        precision: Precision = "float32" if fields.output_dtype == "float" else fields.output_dtype
        form = fields.encoding_format or "float"
        vectors = _hosted.written(_hosted.arrays_of(answers), precision, form, engine, "output_dtype")
        data = [
            {"object": "embedding", "embedding": vector, "index": index} | _replies.cut(answer)
            for index, (vector, answer) in enumerate(zip(vectors, answers, strict=True))
        ]
        usage = {"total_tokens": _replies.tokens_of(answers)}
        return dumps({"object": "list", "data": data, "model": engine.facts.name, "usage": usage})

    return await _replies.write(serving, render, answers)


async def answer_rerank(serving: Serving, http: Request, fields: RerankFields) -> Response:
    """The reply to a body of Voyage's rerank."""
    engine = serving.engine(fields.model)
    scored = await _hosted.rerank(serving, http, engine, fields.query, fields.documents, truncate=fields.truncation)
    data: list[dict[str, Any]] = [
        {"relevance_score": scored.scores[place].score, "index": place}
        | ({"document": fields.documents[place]} if fields.return_documents else {})
        for place in scored.ranked(fields.top_k)
    ]
    usage = {"total_tokens": _replies.tokens_of(scored.answers)}
    body = {"object": "list", "data": data, "model": engine.facts.name, "usage": usage}
    return await _replies.write(serving, lambda: dumps(body), scored.answers)


def shape(failure: Failure) -> Response:
    """Voyage's error body; of an unknown model too it says that the request is bad, and its client knows no 404."""
    return as_json(_hosted.as_bad_request(failure), {"detail": failure.message})


class Error(TypedDict):
    """An error in Voyage's and Jina's shape."""

    detail: str


class Usage(TypedDict):
    """Tokens of the inputs."""

    total_tokens: int


class Embedding(Cut):
    """The vector of an input, as numbers or in base64."""

    object: Literal["embedding"]
    embedding: Vector | str
    index: int


class EmbeddingReply(TypedDict):
    """The reply of /voyage/v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Ranked(TypedDict):
    """A document's place and score."""

    relevance_score: float
    index: int
    document: NotRequired[str]


class RerankReply(TypedDict):
    """The reply of /voyage/v1/rerank, best first."""

    object: Literal["list"]
    data: list[Ranked]
    model: str
    usage: Usage


ERRORS = Errors(Error)
CONTRACTS: Contracts = {
    "/voyage/v1/embeddings": Contract((EmbeddingReply,), (ERRORS,)),
    "/voyage/v1/rerank": Contract((RerankReply,), (ERRORS,)),
}
