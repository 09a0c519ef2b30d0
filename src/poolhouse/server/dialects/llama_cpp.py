"""llama.cpp's /embedding and /reranking; /embeddings too where a body has `content` or `embd_normalize`.

Source: the README of llama.cpp's server. A lone model answers whatever it is called, as there. Its other paths are
OpenAI's and vLLM's. Scores are those of /rerank.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import EngineClosed, InputTooLong, InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import parse_prompts
from poolhouse.outputs import Array
from poolhouse.params import PoolingParams
from poolhouse.server.dialects import _hosted, _replies, openai
from poolhouse.server.dialects._fields import INPUT_SCHEMA, Many, body_schema
from poolhouse.server.dialects.openai import BYTES, METADATA, EmbeddingReply
from poolhouse.server.dialects.tei.info import is_splade
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.body import read_json
from poolhouse.server.wire.contract import Contract, Contracts, Errors, Matrix
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json, speak
from poolhouse.tasks import Task

# Fields by which a body at /embeddings is known to be llama.cpp's.
OWN_EMBEDDING_FIELDS = frozenset({"content", "embd_normalize"})
# The largest number of a vector becomes this one, so that all fit into int16.
_LARGEST = 32760


class ContentFields(BaseModel):
    """The body of POST /embedding."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    content: Any = Field(None, description="A text, token ids, or a list of them.", json_schema_extra=INPUT_SCHEMA)
    input: Any = Field(None, description="Another word for content.", json_schema_extra=INPUT_SCHEMA)
    embd_normalize: int = Field(
        2, ge=-1, description="-1: none; 0: the largest number is 32760; else the p-norm is 1, and 2 is the usual one."
    )


class RerankFields(BaseModel):
    """The body of POST /reranking."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    query: str
    documents: Many[str] | None = None
    texts: Many[str] | None = Field(None, description="Instead of documents: the reply is a bare list, as TEI has it.")
    top_n: int | None = Field(None, ge=1)
    return_text: bool = Field(False, description="With texts: whether results hold them.")


def router(serving: Serving) -> APIRouter:
    routes = direct_router("llama.cpp")

    @routes.post("/embedding", openapi_extra=body_schema(ContentFields))
    async def embedding(http: Request) -> Response:
        """The vectors of each input: one, or one per token where the model has no other."""
        speak(http, shape)
        return await answer_embedding(serving, http, await serving.read(http, ContentFields))

    @routes.post("/embeddings", openapi_extra=body_schema(ContentFields, openai.EmbeddingFields))
    async def embeddings(http: Request) -> Response:
        """As /embedding where the body has fields of llama.cpp's own, else as /v1/embeddings."""
        body = await read_json(http, serving.settings)
        if any(body.get(name) is not None for name in OWN_EMBEDDING_FIELDS):
            speak(http, shape)
            return await answer_embedding(serving, http, serving.parse(body, ContentFields))
        return await openai.answer(serving, http, serving.parse(body, openai.EmbeddingFields))

    @routes.post("/reranking", openapi_extra=body_schema(RerankFields))
    @routes.post("/v1/reranking", include_in_schema=False)
    async def reranking(http: Request) -> Response:
        """Documents by how well they answer a query, best first."""
        speak(http, shape)
        return await _rerank(serving, http, await serving.read(http, RerankFields))

    return routes


async def answer_embedding(serving: Serving, http: Request, fields: ContentFields) -> Response:
    """The reply to a body of /embedding."""
    engine = serving.lone_or_named(fields.model)
    task: Task = "embed" if "embed" in engine.facts.tasks else "token_embed"
    if task not in engine.facts.tasks:
        raise UnsupportedTask(
            f"The model `{engine.facts.name}` has no vectors; its tasks: {list(engine.facts.tasks)}.", "model"
        )
    name = "input" if fields.content is None else "content"
    given = getattr(fields, name)
    if given is None:
        raise InvalidRequest("Give content (texts or token ids).", "content")
    serving.check_list(given, name)
    prompts = parse_prompts(given, name)
    serving.check_items(len(prompts), name)
    params = PoolingParams(use_activation=None if is_splade(engine) else False, overflow="error")
    answers = await serving.answers(
        http, engine, [EngineRequest(prompt, task, params) for prompt in prompts], f"{name}[{{}}]".format
    )

    def rows(array: Array) -> Array:
        return normalised(array, fields.embd_normalize)[None] if array.ndim == 1 else np.ascontiguousarray(array)

    def render() -> bytes:
        return dumps([{"index": index, "embedding": rows(answer.array)} for index, answer in enumerate(answers)])

    return await _replies.write(serving, render, answers)


def normalised(vector: Array, kind: int) -> Array:
    """The vector at the size that `embd_normalize` asks for; one of nothing but zeros stays as it is."""
    largest = float(np.abs(vector).max())
    if kind == -1 or largest == 0:
        return vector
    if kind == 0:
        return vector * np.float32(_LARGEST / largest)
    # Of numbers up to 1, whose powers are in range.
    shares = np.abs(vector).astype(np.float64) / largest
    size = largest * (shares**kind).sum() ** (1 / kind)
    return vector * np.float32(1 / size)


async def _rerank(serving: Serving, http: Request, fields: RerankFields) -> Response:
    engine = serving.lone_or_named(fields.model)
    name = "documents" if fields.texts is None else "texts"
    documents = getattr(fields, name)
    if not documents:
        raise InvalidRequest(f"{name} must hold at least one text.", name)
    scored = await _hosted.rerank(serving, http, engine, fields.query, documents, truncate=False)
    best = [(place, scored.scores[place].score) for place in scored.ranked(fields.top_n)]
    body: Any
    if fields.texts is None:
        tokens = _replies.tokens_of(scored.answers)
        body = {
            "model": engine.facts.name,
            "object": "list",
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": [{"index": place, "relevance_score": score} for place, score in best],
        }
    else:
        texts = {place: {"text": documents[place]} if fields.return_text else {} for place, _ in best}
        body = [{"index": place, "score": score} | texts[place] for place, score in best]
    return await _replies.write(serving, lambda: dumps(body), scored.answers)


def shape(failure: Failure) -> Response:
    """llama.cpp's error body."""
    error = {"code": failure.status, "message": failure.message, "type": _kind(failure)}
    return as_json(failure, {"error": error})


def _kind(failure: Failure) -> str:
    """llama.cpp's word for it."""
    match failure.error:
        case InputTooLong():
            return "exceed_context_size_error"
        case EngineClosed():
            return "unavailable_error"
    if failure.status in (404, 405):
        return "not_found_error"
    return "invalid_request_error" if failure.status < 500 else "server_error"


class Problem(TypedDict):
    """What went wrong."""

    code: int
    message: str
    type: str


class Error(TypedDict):
    """An error in llama.cpp's shape."""

    error: Problem


class Embedding(TypedDict):
    """The vectors of an input."""

    index: int
    embedding: Matrix


class Usage(TypedDict):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class Ranked(TypedDict):
    """A document's place and score."""

    index: int
    relevance_score: float


class RerankReply(TypedDict):
    """The reply of /reranking to `documents`, best first."""

    model: str
    object: Literal["list"]
    usage: Usage
    results: list[Ranked]


class _Rank(TypedDict):
    index: int
    score: float


class Rank(_Rank, total=False):
    """A text's place and score."""

    text: str


_ERRORS = (Errors(Error),)
CONTRACTS: Contracts = {
    "/embedding": Contract((list[Embedding],), _ERRORS),
    "/embeddings": Contract((list[Embedding], EmbeddingReply), (*_ERRORS, Errors()), BYTES, METADATA),
    "/reranking": Contract((RerankReply, list[Rank]), _ERRORS),
}
