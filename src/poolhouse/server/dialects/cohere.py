"""Cohere's embed and rerank, versions 1 and 2; /v1/embed and /v2/embed at their own paths, everything under /cohere.

Of rerank, whose paths are vLLM's too, version 1 is told by fields of its own, and version 2 is answered in vLLM's form
with Cohere's `meta`.

Source: Cohere's API reference. /v2/embed is vLLM's too, which leaves `model` and `input_type` away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest
from poolhouse.server.dialects import _hosted, _replies, health
from poolhouse.server.dialects._fields import Lenient, Many, body_schema
from poolhouse.server.dialects._hosted import Kind, Wish
from poolhouse.server.dialects._pairs import Scored
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.contract import Contract, Contracts, Errors, Matrix
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json, speak

# Fields of version 1 of rerank that no other dialect at /v1/rerank has.
OWN_RERANK_FIELDS = frozenset({"rank_fields", "max_chunks_per_doc"})


class EmbedFields(Lenient):
    """The body of POST /v1/embed and /v2/embed."""

    model: str | None = None
    input_type: str | None = Field(None, description="search_query, search_document, or the name of a prompt.")
    texts: Many[str] | None = None
    images: Many[str] | None = Field(None, description="Refused: no model here reads pictures.")
    inputs: Many[dict[str, Any]] | None = Field(None, description="[{content: [{type: text, text}]}].")
    embedding_types: Many[Kind] | None = None
    output_dimension: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    truncate: Literal["NONE", "START", "END"] = "END"
    priority: int = Field(0, ge=0, le=999)

    def words(self) -> list[str]:
        """The texts, from one of three fields.

        Raises:
            InvalidRequest: none of them, several, or pictures.
        """
        given = [name for name in ("texts", "images", "inputs") if getattr(self, name)]
        if len(given) != 1:
            raise InvalidRequest("Give one of texts, images and inputs, and not an empty one.", "texts")
        if self.images:
            raise InvalidRequest("images: the models of this server read texts.", "images")
        return _hosted.texts_of(self.texts or self.inputs, given[0])

    def wish(self, most_tokens: int) -> Wish:
        """How the vectors are wanted. most_tokens: those that the model reads, which `max_tokens` cannot raise."""
        return Wish(
            self.input_type,
            self.output_dimension,
            truncate=self.truncate if "truncate" in self.model_fields_set else None,
            max_tokens=None if self.max_tokens is None else min(self.max_tokens, most_tokens),
            priority=self.priority,
        )


class RerankFields(BaseModel):
    """The body of POST /cohere/v1/rerank and /cohere/v2/rerank."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    query: str
    documents: Many[str | dict[str, Any]]
    top_n: int | None = Field(None, ge=1)
    rank_fields: Many[str] | None = Field(None, description="Version 1: fields of documents that are read, in order.")
    return_documents: bool = Field(False, description="Version 1: whether results hold their documents.")
    max_chunks_per_doc: int | None = Field(None, ge=1, description="Without effect: a document is read in one piece.")
    max_tokens_per_doc: int = Field(4096, ge=1)
    priority: int = Field(0, ge=0, le=999)

    def words(self) -> list[str]:
        """The text of each document.

        Raises:
            InvalidRequest: a document without text.
        """
        return [_words(document, self.rank_fields, index) for index, document in enumerate(self.documents)]


def router(serving: Serving) -> APIRouter:
    routes = direct_router("cohere")
    _add_embed(routes, serving)
    return routes


def prefixed_router(serving: Serving) -> APIRouter:
    """All of Cohere under /cohere, rerank too, whose paths other dialects share."""
    routes = direct_router("cohere", "/cohere")
    _add_embed(routes, serving)

    @routes.post("/v1/rerank", openapi_extra=body_schema(RerankFields))
    async def rerank_v1(http: Request) -> Response:
        """Documents by how well they answer a query, best first."""
        speak(http, shape)
        return await answer_rerank(serving, http, await serving.read(http, RerankFields), 1)

    @routes.post("/v2/rerank", openapi_extra=body_schema(RerankFields))
    async def rerank_v2(http: Request) -> Response:
        """As version 1, without the documents."""
        speak(http, shape)
        return await answer_rerank(serving, http, await serving.read(http, RerankFields), 2)

    @routes.get("/v1/models")
    async def models(http: Request) -> Response:
        """The served models; `?endpoint=` leaves those that it can ask."""
        wanted = http.query_params.get("endpoint")
        known = [_model(name, engine) for name, engine in serving.engines.items()]
        listed = [model for model in known if wanted is None or wanted in model["endpoints"]]
        return Response(dumps({"models": listed}), media_type="application/json")

    @routes.get("/v1/models/{model:path}")
    async def model(http: Request) -> Response:
        """One of the served models."""
        speak(http, shape)
        name = http.path_params["model"]
        health.found(serving, name)
        return Response(dumps(_model(name, serving.engine(name))), media_type="application/json")

    return routes


def _add_embed(routes: APIRouter, serving: Serving) -> None:
    @routes.post("/v1/embed", openapi_extra=body_schema(EmbedFields))
    async def embed_v1(http: Request) -> Response:
        """One vector per text: bare ones, or by type where `embedding_types` asks."""
        speak(http, shape)
        return await _embed(serving, http, await serving.read(http, EmbedFields), 1)

    @routes.post("/v2/embed", openapi_extra=body_schema(EmbedFields))
    async def embed_v2(http: Request) -> Response:
        """One vector per text in each of the types asked for."""
        speak(http, shape)
        return await _embed(serving, http, await serving.read(http, EmbedFields), 2)


async def _embed(serving: Serving, http: Request, fields: EmbedFields, version: int) -> Response:
    engine = serving.engine(fields.model)
    texts = fields.words()
    answers = await _hosted.embed(serving, http, engine, texts, fields.wish(engine.facts.max_tokens), parameter="texts")
    kinds: list[Kind] = list(dict.fromkeys(fields.embedding_types or ["float"]))
    bare = version == 1 and not fields.embedding_types
    head: dict[str, Any] = {"id": _replies.reply_id("embd", http, None)}
    tail = {
        "texts": texts,
        "meta": _meta(version, {"input_tokens": _replies.tokens_of(answers)}, answers),
        "response_type": "embeddings_floats" if bare else "embeddings_by_type",
    }

    def render() -> bytes:
        by_type = {kind: _matrix(answers, kind, engine) for kind in kinds}
        return dumps({**head, "embeddings": by_type["float"] if bare else by_type, **tail})

    return await _replies.write(serving, render, answers)


def _matrix(answers: Sequence[Answer], kind: Kind, engine: PoolingEngine) -> Any:
    vectors = _hosted.vectors(_hosted.arrays_of(answers), kind, engine, "embedding_types")
    return vectors if kind == "base64" else np.stack(vectors)


async def answer_rerank(serving: Serving, http: Request, fields: RerankFields, version: int) -> Response:
    """The reply to a body of Cohere's rerank."""
    engine = serving.engine(fields.model)
    scored = await _hosted.rerank(
        serving,
        http,
        engine,
        fields.query,
        fields.words(),
        max_tokens_per_doc=fields.max_tokens_per_doc,
        priority=fields.priority,
    )
    echo = version == 1 and fields.return_documents
    body = {
        "id": _replies.reply_id("rerank", http, None),
        "results": [_result(place, scored, fields, echo) for place in scored.ranked(fields.top_n)],
        "meta": rerank_meta(version, scored),
    }
    return await _replies.write(serving, lambda: dumps(body), scored.answers)


def rerank_meta(version: int, scored: Scored) -> dict[str, Any]:
    """What is said of a request for a rerank."""
    return _meta(version, {"search_units": _hosted.search_units(len(scored.scores))}, scored.answers)


def _result(place: int, scored: Scored, fields: RerankFields, echo: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"index": place, "relevance_score": scored.scores[place].score}
    if echo:
        document = fields.documents[place]
        result["document"] = {"text": document} if isinstance(document, str) else document
    return result


def _words(document: str | dict[str, Any], fields: Sequence[str] | None, index: int) -> str:
    if isinstance(document, str):
        return document
    names = fields or ["text"]
    missing = [name for name in names if not isinstance(document.get(name), str)]
    if missing:
        raise InvalidRequest(f"documents[{index}] has no text '{missing[0]}'.", f"documents[{index}]")
    return "\n".join(document[name] for name in names)


def _meta(version: int, units: dict[str, int], answers: Sequence[Answer]) -> dict[str, Any]:
    meta: dict[str, Any] = {"api_version": {"version": str(version)}, "billed_units": units}
    warnings = _hosted.warnings_of(answers)
    return {**meta, "warnings": warnings} if warnings else meta


def _model(name: str, engine: PoolingEngine) -> dict[str, Any]:
    # Whatever has vectors, or one score for a pair, reranks.
    embeds = "embed" in engine.facts.tasks
    can = {
        "embed": embeds,
        "rerank": embeds or "token_embed" in engine.facts.tasks or engine.facts.labels == 1,
        "classify": engine.facts.labels > 1,
    }
    return {
        "name": name,
        "endpoints": [endpoint for endpoint, there in can.items() if there],
        "finetuned": False,
        "context_length": engine.facts.max_tokens,
        "tokenizer_url": None,
        "default_endpoints": [],
    }


def shape(failure: Failure) -> Response:
    """Cohere's error body."""
    return as_json(failure, {"message": failure.message})


class Error(TypedDict):
    """An error in Cohere's shape."""

    message: str


class ApiVersion(TypedDict):
    """Of Cohere's API."""

    version: Literal["1", "2"]


class BilledUnits(TypedDict):
    """What was read: tokens of embeddings, or one search unit per hundred documents."""

    input_tokens: NotRequired[int]
    search_units: NotRequired[int]


class Meta(TypedDict):
    """About the request."""

    api_version: ApiVersion
    billed_units: BilledUnits
    warnings: NotRequired[list[str]]


# Not a class, for the name `float`.
class EmbeddingsByType(TypedDict, total=False):
    float: Matrix
    int8: list[list[int]]
    uint8: list[list[int]]
    binary: list[list[int]]
    ubinary: list[list[int]]
    base64: list[str]


class EmbedReply(TypedDict):
    """The reply of /v1/embed and /v2/embed; bare vectors in version 1, where no types were asked for."""

    id: str
    embeddings: Matrix | EmbeddingsByType
    texts: list[str]
    meta: Meta
    response_type: Literal["embeddings_floats", "embeddings_by_type"]


class Ranked(TypedDict):
    """A document's place and score."""

    index: int
    relevance_score: float
    document: NotRequired[dict[str, Any]]


class RerankReply(TypedDict):
    """The reply of /v1/rerank and /v2/rerank, best first."""

    id: str
    results: list[Ranked]
    meta: Meta


class Model(TypedDict):
    """A served model, and the endpoints that it can answer."""

    name: str
    endpoints: list[Literal["embed", "rerank", "classify"]]
    finetuned: bool
    context_length: int
    tokenizer_url: None
    default_endpoints: list[str]


class Models(TypedDict):
    """The served models."""

    models: list[Model]


ERRORS = (Errors(Error),)
_EMBED = Contract((EmbedReply,), ERRORS)
_RERANK = Contract((RerankReply,), ERRORS)
CONTRACTS: Contracts = {
    "/v1/embed": _EMBED,
    "/v2/embed": _EMBED,
    "/cohere/v1/embed": _EMBED,
    "/cohere/v2/embed": _EMBED,
    "/cohere/v1/rerank": _RERANK,
    "/cohere/v2/rerank": _RERANK,
    "/cohere/v1/models": Contract((Models,), (), query={"endpoint": "Leave the models that it can ask."}),
    "/cohere/v1/models/{model}": Contract((Model,), (Errors(Error, (404,)),)),
}
