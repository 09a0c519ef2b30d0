"""Weaviate's text2vec-transformers and reranker-transformers: one text in, one vector out, and scores in the order given.

All of it under /weaviate. Its vectors and probes stand at their own paths too; at /rerank, which vLLM's clients ask with
the same body, the reply holds both forms.

Source: the two inference containers. They serve one model each and hear no name of one: of several, the first answers
that can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.errors import InvalidRequest
from poolhouse.server.dialects import _hosted, _replies, health
from poolhouse.server.dialects._fields import Many, body_schema
from poolhouse.server.dialects._hosted import Wish
from poolhouse.server.dialects._pairs import Scored
from poolhouse.server.dialects.health import Model
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.contract import Contract, Contracts, Errors, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json, speak

# The fields that its reranker sends, and no others.
RERANK_FIELDS = frozenset({"query", "documents"})


class Config(BaseModel):
    """How a vector is wanted."""

    model_config = ConfigDict(extra="ignore", strict=True)

    pooling_strategy: str | None = Field(None, description="Without effect: the checkpoint says how it pools.")
    task_type: Literal["query", "passage"] | None = None
    dimensions: int | None = None


class VectorFields(BaseModel):
    """The body of POST /vectors."""

    model_config = ConfigDict(extra="ignore", strict=True)

    text: str
    config: Config = Config()


class RerankFields(BaseModel):
    """The body of POST /weaviate/rerank."""

    model_config = ConfigDict(extra="ignore", strict=True)

    query: str
    documents: Many[str] | None = None
    text: str | None = Field(None, alias="property", description="Instead of documents: one text.")


def router(serving: Serving) -> APIRouter:
    routes = direct_router("weaviate")
    _add(routes, serving)
    return routes


def prefixed_router(serving: Serving) -> APIRouter:
    """All of Weaviate's containers under /weaviate."""
    routes = direct_router("weaviate", "/weaviate")
    _add(routes, serving)

    @routes.post("/rerank", openapi_extra=body_schema(RerankFields))
    async def rerank(http: Request) -> Response:
        """The score of each document, in the order of the documents."""
        speak(http, shape)
        return await answer_rerank(serving, http, await serving.read(http, RerankFields))

    return routes


def _add(routes: APIRouter, serving: Serving) -> None:
    @routes.post("/vectors", openapi_extra=body_schema(VectorFields))
    @routes.post("/vectors/", include_in_schema=False)
    async def vectors(http: Request) -> Response:
        """The vector of one text."""
        speak(http, shape)
        return await _vector(serving, http, await serving.read(http, VectorFields))

    @routes.get("/meta")
    async def meta(_: Request) -> Response:
        """The first model, as /v1/models has it."""
        return Response(dumps(health.about(serving, next(iter(serving.engines)))), media_type="application/json")

    @routes.get("/.well-known/live", include_in_schema=False)
    async def live(_: Request) -> Response:
        """204 as long as the process answers."""
        return Response(status_code=204)

    @routes.get("/.well-known/ready", include_in_schema=False)
    async def ready(_: Request) -> Response:
        """204 while every engine can answer, else 503."""
        answer = health.answer(serving)
        return Response(status_code=204) if answer.status_code == 200 else answer


async def _vector(serving: Serving, http: Request, fields: VectorFields) -> Response:
    engine = _first(serving, lambda engine: "embed" in engine.facts.tasks)
    use = {"query": "query", "passage": "document", None: None}[fields.config.task_type]
    wish = Wish(use, fields.config.dimensions)
    answers = await _hosted.embed(serving, http, engine, [fields.text], wish, parameter="text")
    vector = answers[0].array
    return await _replies.write(
        serving, lambda: dumps({"text": fields.text, "vector": vector, "dim": len(vector)}), answers
    )


async def answer_rerank(serving: Serving, http: Request, fields: RerankFields) -> Response:
    """The reply to a body of its reranker."""
    engine = _first(serving, lambda engine: "classify" in engine.facts.tasks and engine.facts.labels == 1)
    if (fields.documents is None) == (fields.text is None):
        raise InvalidRequest("Give documents, or one property.", "documents")
    documents = [fields.text] if fields.text is not None else fields.documents or []
    scored = await _hosted.rerank(serving, http, engine, fields.query, documents)
    body: dict[str, Any] = {"query": fields.query}
    if fields.text is not None:
        body |= {"property": fields.text, "score": scored.scores[0].score}
    else:
        body = in_order(fields.query, documents, scored)
    return await _replies.write(serving, lambda: orjson.dumps(body), scored.answers)


def in_order(query: str, documents: Sequence[str], scored: Scored) -> dict[str, Any]:
    """The query, and the score of each document in the order given."""
    pairs = zip(documents, scored.scores, strict=True)
    return {"query": query, "scores": [{"document": document, "score": one.score} for document, one in pairs]}


def _first(serving: Serving, fits: Callable[[PoolingEngine], bool]) -> PoolingEngine:
    """The first engine that fits; where none does, the first."""
    return next(filter(fits, serving.engines.values()), serving.engine(None))


def shape(failure: Failure) -> Response:
    """The containers' error body."""
    return as_json(failure, {"error": failure.message})


class Error(TypedDict):
    """An error in the shape of Weaviate's containers."""

    error: str


class VectorReply(TypedDict):
    """The reply of /vectors."""

    text: str
    vector: Vector
    dim: int


class DocumentScore(TypedDict):
    """A document and its score."""

    document: str
    score: float


class RerankReply(TypedDict):
    """The reply of /weaviate/rerank to documents, in their order."""

    query: str
    scores: list[DocumentScore]


class PropertyReply(TypedDict):
    """The reply of /weaviate/rerank to one text."""

    query: str
    property: str
    score: float


_ERRORS = (Errors(Error),)
CONTRACTS: Contracts = {
    f"{under}{path}": contract
    for under in ("", "/weaviate")
    for path, contract in {"/vectors": Contract((VectorReply,), _ERRORS), "/meta": Contract((Model,), ())}.items()
} | {"/weaviate/rerank": Contract((RerankReply, PropertyReply), _ERRORS)}
