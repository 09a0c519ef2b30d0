"""Jina's embeddings, multi-vector and rerank under /jina; /v1/multi-vector at its own path too.

Source: Jina's API reference. Its other paths are OpenAI's and vLLM's; those understand Jina's fields as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest
from poolhouse.outputs import Array
from poolhouse.server.dialects import _hosted, _replies, openai
from poolhouse.server.dialects._fields import Many, body_schema
from poolhouse.server.dialects._hosted import Kind, Wish
from poolhouse.server.dialects.voyage import ERRORS, Error
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.contract import Contract, Contracts, Cut, Errors, Matrix, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json, speak

_TEXTS = "A text, {text}, or a list of them."


class EmbeddingFields(BaseModel):
    """The body of POST /jina/v1/embeddings."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    input: Any = Field(description=_TEXTS)
    task: str | None = Field(None, description="retrieval.query, retrieval.passage, ... or the name of a prompt.")
    dimensions: int | None = None
    normalized: bool | None = None
    embedding_type: Kind | Annotated[Many[Kind], Field(min_length=1)] = "float"
    late_chunking: bool = False
    truncate: bool = Field(False, description="Cut texts over the limit instead of refusing them.")
    return_multivector: bool = False

    def wish(self) -> Wish:
        """How the vectors are wanted."""
        return Wish(self.task, self.dimensions, self.normalized, None if self.truncate else "NONE")


class MultiVectorFields(BaseModel):
    """The body of POST /v1/multi-vector."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    input: Any = Field(description=_TEXTS)
    input_type: Literal["query", "document"] | None = None
    dimensions: int | None = None
    embedding_type: Kind = "float"
    truncate: bool = True


class RerankFields(BaseModel):
    """The body of POST /jina/v1/rerank."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    query: str | dict[str, Any]
    documents: Many[str | dict[str, Any]]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


def router(serving: Serving) -> APIRouter:
    routes = direct_router("jina")
    _add_multi_vector(routes, serving)
    return routes


def prefixed_router(serving: Serving) -> APIRouter:
    """All of Jina under /jina."""
    routes = direct_router("jina", "/jina")
    _add_multi_vector(routes, serving)

    @routes.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingFields))
    async def embeddings(http: Request) -> Response:
        """One vector per input, or one per token where `return_multivector` asks."""
        speak(http, shape)
        return await _embeddings(serving, http, await serving.read(http, EmbeddingFields))

    @routes.post("/v1/rerank", openapi_extra=body_schema(RerankFields))
    async def rerank(http: Request) -> Response:
        """Documents by how well they answer a query, best first."""
        speak(http, shape)
        return await _rerank(serving, http, await serving.read(http, RerankFields))

    return routes


def _add_multi_vector(routes: APIRouter, serving: Serving) -> None:
    @routes.post("/v1/multi-vector", openapi_extra=body_schema(MultiVectorFields))
    async def multi_vector(http: Request) -> Response:
        """One vector per token of each input."""
        speak(http, shape)
        fields = await serving.read(http, MultiVectorFields)
        wish = Wish(fields.input_type, fields.dimensions, truncate=None if fields.truncate else "NONE")
        return await _vectors(serving, http, fields.model, fields.input, wish, [fields.embedding_type], per_token=True)


async def _embeddings(serving: Serving, http: Request, fields: EmbeddingFields) -> Response:
    kinds = (
        [fields.embedding_type] if isinstance(fields.embedding_type, str) else [*dict.fromkeys(fields.embedding_type)]
    )
    wish = fields.wish()
    if not fields.late_chunking:
        per_token = fields.return_multivector
        return await _vectors(serving, http, fields.model, fields.input, wish, kinds, per_token=per_token)
    if fields.return_multivector:
        raise InvalidRequest("late_chunking gives a vector per chunk; leave return_multivector out.", "late_chunking")
    engine = serving.engine(fields.model)
    requests = _hosted.requests(serving, engine, _hosted.texts_of(fields.input, "input"), wish, "embed", "input")
    read = await openai.read(serving, http, engine, requests)
    return await _write(serving, [read.whole], read.chunks, kinds, engine)


async def _vectors(
    serving: Serving, http: Request, model: str | None, given: Any, wish: Wish, kinds: list[Kind], *, per_token: bool
) -> Response:
    engine = serving.engine(model)
    texts = _hosted.texts_of(given, "input")
    answers = await _hosted.embed(serving, http, engine, texts, wish, task="token_embed" if per_token else "embed")
    return await _write(serving, answers, _hosted.arrays_of(answers), kinds, engine)


async def _write(
    serving: Serving, answers: Sequence[Answer], arrays: Sequence[Array], kinds: list[Kind], engine: PoolingEngine
) -> Response:
    """One object per array; of several kinds, its vectors by kind."""
    tokens = _replies.tokens_of(answers)
    name = "embedding" if arrays[0].ndim == 1 else "embeddings"
    cuts = _replies.cuts(answers, len(arrays))

    def render() -> bytes:
        by_kind = {kind: _hosted.vectors(arrays, kind, engine, "embedding_type") for kind in kinds}
        data = []
        for index, cut in enumerate(cuts):
            forms = {kind: vectors[index] for kind, vectors in by_kind.items()}
            data.append({"object": name, "index": index, name: forms if len(kinds) > 1 else forms[kinds[0]]} | cut)
        usage = {"total_tokens": tokens, "prompt_tokens": tokens}
        return dumps({"model": engine.facts.name, "object": "list", "usage": usage, "data": data})

    return await _replies.write(serving, render, answers)


async def _rerank(serving: Serving, http: Request, fields: RerankFields) -> Response:
    engine = serving.engine(fields.model)
    (query,) = _hosted.texts_of([fields.query], "query")
    documents = _hosted.texts_of(fields.documents, "documents")
    scored = await _hosted.rerank(serving, http, engine, query, documents)
    tokens = _replies.tokens_of(scored.answers)
    results = [
        {"index": place, "relevance_score": scored.scores[place].score}
        | ({"document": {"text": documents[place]}} if fields.return_documents else {})
        for place in scored.ranked(fields.top_n)
    ]
    usage = {"total_tokens": tokens, "prompt_tokens": tokens}
    body = {"model": engine.facts.name, "object": "list", "usage": usage, "results": results}
    return await _replies.write(serving, lambda: dumps(body), scored.answers)


def shape(failure: Failure) -> Response:
    """Jina's error body; wrong fields are a 422, and an unknown model a 400."""
    return as_json(_hosted.with_their_statuses(failure), {"detail": failure.message})


class Usage(TypedDict):
    """Tokens of the inputs."""

    total_tokens: int
    prompt_tokens: int


class Embedding(Cut):
    """The vector of an input, as numbers or in base64; by kind where several kinds were asked for."""

    object: Literal["embedding"]
    index: int
    embedding: Vector | str | dict[Kind, Vector | str]


class Embeddings(Cut):
    """The vectors of an input's tokens; by kind where several kinds were asked for."""

    object: Literal["embeddings"]
    index: int
    embeddings: Matrix | str | dict[Kind, Matrix | str]


class EmbeddingReply(TypedDict):
    """The reply of /jina/v1/embeddings and /v1/multi-vector."""

    model: str
    object: Literal["list"]
    usage: Usage
    data: list[Embedding] | list[Embeddings]


class Document(TypedDict):
    """A document as it was read."""

    text: str


class Ranked(TypedDict):
    """A document's place and score."""

    index: int
    relevance_score: float
    document: NotRequired[Document]


class RerankReply(TypedDict):
    """The reply of /jina/v1/rerank, best first."""

    model: str
    object: Literal["list"]
    usage: Usage
    results: list[Ranked]


_ERRORS = (ERRORS, Errors(Error, (422,)))
CONTRACTS: Contracts = {
    "/v1/multi-vector": Contract((EmbeddingReply,), _ERRORS),
    "/jina/v1/multi-vector": Contract((EmbeddingReply,), _ERRORS),
    "/jina/v1/embeddings": Contract((EmbeddingReply,), _ERRORS),
    "/jina/v1/rerank": Contract((RerankReply,), _ERRORS),
}
