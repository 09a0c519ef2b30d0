"""llama.cpp: /embedding and /reranking; /embeddings too where a body has `content` or `embd_normalize`.

Source: the README of llama.cpp's server. A single model answers whatever it is called, as there. Its other paths are
OpenAI's and vLLM's. Scores are those of /rerank.
"""

from __future__ import annotations

from typing import Literal, NotRequired

import numpy as np
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import EngineClosed, InputTooLong, InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import parse_prompts
from poolhouse.outputs import Array
from poolhouse.params import PoolingParams
from poolhouse.server.call import Call, JsonObject
from poolhouse.server.dialects import _hosted, _replies, openai
from poolhouse.server.dialects._fields import INPUT_SCHEMA, Many, Strict, with_options
from poolhouse.server.dialects._replies import TokenCounts
from poolhouse.server.dialects.openai import BYTES, METADATA, EmbeddingReply
from poolhouse.server.dialects.tei.info import is_splade
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.contract import Errors, Matrix
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json
from poolhouse.tasks import Task

# Fields by which a body at /embeddings is known to be llama.cpp's.
OWN_EMBEDDING_FIELDS = frozenset({"content", "embd_normalize"})
# The largest number of a vector becomes this one, so that all fit into int16.
_LARGEST = 32760


class ContentFields(Strict):
    """The body of POST /embedding."""

    model: str | None = None
    content: object = Field(None, description="A text, token ids, or a list of them.", json_schema_extra=INPUT_SCHEMA)
    input: object = Field(None, description="Another name for content.")
    embd_normalize: int = Field(
        2, ge=-1, description="-1: none; 0: the largest number is 32760; else the p-norm is 1, and 2 is the usual one."
    )


class RerankFields(Strict):
    """The body of POST /reranking."""

    model: str | None = None
    query: str
    documents: Many[str] | None = None
    texts: Many[str] | None = Field(None, description="Instead of documents: the reply is a bare list, as TEI has it.")
    top_n: int | None = Field(None, ge=1)
    return_text: bool = Field(False, description="With texts: whether results hold them.")


async def embedding(call: Call, fields: ContentFields) -> Response:
    """The vectors of each input: one, or one per token where the model has no other."""
    engine = await call.use(fields.model, any_name=True)
    task: Task = "embed" if "embed" in engine.facts.tasks else "token_embed"
    if task not in engine.facts.tasks:
        raise UnsupportedTask(
            f"The model `{engine.facts.name}` has no vectors; its tasks: {list(engine.facts.tasks)}.", "model"
        )
    name, content = ("input", fields.input) if fields.content is None else ("content", fields.content)
    if content is None:
        raise InvalidRequest("Give content (texts or token ids).", "content")
    call.engines.check_list(content, name)
    prompts = parse_prompts(content, name)
    call.engines.check_items(len(prompts), name)
    params = PoolingParams(use_activation=None if is_splade(engine) else False, overflow="error")
    requests = [EngineRequest(with_options(prompt, {}), task, params) for prompt in prompts]
    answers = await call.answers(requests, f"{name}[{{}}]".format)

    def rows(array: Array) -> Array:
        return normalised(array, fields.embd_normalize)[None] if array.ndim == 1 else np.ascontiguousarray(array)

    def render() -> bytes:
        return dumps([{"index": index, "embedding": rows(answer.array)} for index, answer in enumerate(answers)])

    return await call.write(render, answers)


async def embeddings(call: Call, body: JsonObject) -> Response:
    """As /embedding where the body has fields of llama.cpp's own, else as /v1/embeddings."""
    if OWN_EMBEDDING_FIELDS & body.keys():
        call.speak(shape)
        return await embedding(call, call.parse(body, ContentFields))
    return await openai.embeddings(call, call.parse(body, openai.EmbeddingFields))


async def reranking(call: Call, fields: RerankFields) -> Response:
    """Documents by how well they answer a query, best first."""
    engine = await call.use(fields.model, any_name=True)
    name, documents = ("documents", fields.documents) if fields.texts is None else ("texts", fields.texts)
    scored = await _hosted.rerank(call, fields.query, documents or [], parameter=name, truncate=False)
    best = scored.best(fields.top_n)
    body: RerankReply | list[Rank]
    if fields.texts is None:
        body = {
            "model": engine.facts.name,
            "object": "list",
            "usage": _replies.token_counts(scored.answers),
            "results": [{"index": index, "relevance_score": score} for index, score in best],
        }
    else:
        body = [{"index": index, "score": score} for index, score in best]
        if fields.return_text:
            for ranked in body:
                ranked["text"] = fields.texts[ranked["index"]]
    return await call.write(lambda: dumps(body), scored.answers)


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


def shape(failure: Failure) -> Response:
    """llama.cpp's error body."""
    error = {"code": failure.status, "message": failure.message, "type": _kind(failure)}
    return as_json(failure, {"error": error})


def _kind(failure: Failure) -> str:
    """llama.cpp's name for it."""
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


class Ranked(TypedDict):
    """A document's index and score."""

    index: int
    relevance_score: float


class RerankReply(TypedDict):
    """The reply of /reranking to `documents`, best first."""

    model: str
    object: Literal["list"]
    usage: TokenCounts
    results: list[Ranked]


class Rank(TypedDict):
    """A text's index and score."""

    index: int
    score: float
    text: NotRequired[str]


ERRORS = (Errors(Error),)
DIALECTS = (
    Dialect(
        "llama.cpp",
        (
            Route("POST", "/embedding", embedding, ContentFields, (list[Embedding],)),
            Route(
                "POST",
                "/reranking",
                reranking,
                RerankFields,
                (RerankReply, list[Rank]),
                others=("/v1/reranking",),
            ),
        ),
        shape,
        ERRORS,
        owns=("/embedding", "/reranking", "/v1/reranking"),
    ),
    # Errors before the body is known are in the server's own shape.
    Dialect(
        "llama.cpp",
        (
            Route(
                "POST",
                "/embeddings",
                embeddings,
                (ContentFields, openai.EmbeddingFields),
                (list[Embedding], EmbeddingReply),
                (*ERRORS, Errors()),
                BYTES,
                METADATA,
            ),
        ),
    ),
)
