"""Voyage: embeddings, of pictures too, and rerank under /voyage; multimodal ones at their own path too.

Its rerank stands at /v1/rerank too, recognised by its own fields.

Source: Voyage's OpenAPI description.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.request import Answer
from poolhouse.server.call import Call
from poolhouse.server.dialects import _hosted, _replies
from poolhouse.server.dialects._fields import Items, Many, Strict
from poolhouse.server.dialects._hosted import EmbedOptions
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.contract import Cut, Errors, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json

# Voyage counts a token per so many pixels; usage turns the tokens of pictures back into these.
_PIXELS_PER_TOKEN = 560
# Fields of Voyage's rerank that no other dialect at /v1/rerank has.
OWN_RERANK_FIELDS = frozenset({"top_k", "truncation"})


class EmbeddingFields(Strict):
    """The body of POST /voyage/v1/embeddings."""

    model: str | None = None
    input: str | Many[str]
    input_type: str | None = Field(None, description="query, document, or the name of a prompt.")
    truncation: bool = True
    output_dimension: int | None = None
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] = "float"
    encoding_format: Literal["base64"] | None = None


class MultimodalFields(Strict):
    """The body of POST /v1/multimodalembeddings."""

    model: str | None = None
    inputs: Items[dict[str, object]] = Field(
        min_length=1,
        description="{content: [parts]}, each {type: text, text}, {type: image_url, image_url} or "
        "{type: image_base64, image_base64}.",
    )
    input_type: str | None = Field(None, description="query, document, or the name of a prompt.")
    truncation: bool = True
    output_dimension: int | None = None
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] = "float"
    output_encoding: Literal["base64"] | None = None


class RerankFields(Strict):
    """The body of POST /voyage/v1/rerank."""

    model: str | None = None
    query: str
    documents: Many[str]
    top_k: int | None = Field(None, ge=1)
    return_documents: bool = False
    truncation: bool = True


async def embeddings(call: Call, fields: EmbeddingFields) -> Response:
    """One vector per input."""
    await call.use(fields.model)
    texts = [fields.input] if isinstance(fields.input, str) else fields.input
    answers = await _hosted.embed(call, texts, _options(fields))
    return await _write(call, answers, fields, fields.encoding_format == "base64", _usage(answers))


async def multimodal_embeddings(call: Call, fields: MultimodalFields) -> Response:
    """One vector per input, each of texts and pictures together."""
    await call.use(fields.model)
    inputs = _hosted.contents_of(call.engines, fields.inputs, "inputs")
    answers = await _hosted.embed(call, inputs, _options(fields), parameter="inputs")
    tokens, of_pictures = _replies.tokens_of(answers), _replies.picture_tokens_of(answers)
    usage: MultimodalUsage = {
        "text_tokens": tokens - of_pictures,
        "image_pixels": of_pictures * _PIXELS_PER_TOKEN,
        "video_pixels": 0,
        "total_tokens": tokens,
    }
    return await _write(call, answers, fields, fields.output_encoding == "base64", usage)


def _options(fields: EmbeddingFields | MultimodalFields) -> EmbedOptions:
    return EmbedOptions(fields.input_type, fields.output_dimension, truncate=None if fields.truncation else "NONE")


async def _write(
    call: Call,
    answers: Sequence[Answer],
    fields: EmbeddingFields | MultimodalFields,
    in_base64: bool,
    usage: Usage | MultimodalUsage,
) -> Response:
    def render() -> bytes:
        arrays = _hosted.arrays_of(answers)
        vectors = _hosted.vectors(call, arrays, fields.output_dtype, "output_dtype", in_base64=in_base64)
        data = list(_hosted.embedding_objects(vectors, answers))
        return dumps({"object": "list", "data": data, "model": call.engine.facts.name, "usage": usage})

    return await call.write(render, answers)


async def rerank(call: Call, fields: RerankFields) -> Response:
    """Documents by how well they answer a query, best first, as `data`."""
    engine = await call.use(fields.model)
    scored = await _hosted.rerank(call, fields.query, fields.documents, truncate=fields.truncation)
    data: list[Ranked] = [{"relevance_score": score, "index": index} for index, score in scored.best(fields.top_k)]
    if fields.return_documents:
        for ranked in data:
            ranked["document"] = fields.documents[ranked["index"]]
    body: RerankReply = {
        "object": "list",
        "data": data,
        "model": engine.facts.name,
        "usage": _usage(scored.answers),
    }
    return await call.write(lambda: dumps(body), scored.answers)


def _usage(answers: Sequence[Answer]) -> Usage:
    return {"total_tokens": _replies.tokens_of(answers)}


def shape(failure: Failure) -> Response:
    """Voyage's error body; of an unknown model too it says that the request is bad, and its client knows no 404."""
    return as_json(_hosted.as_bad_request(failure), {"detail": failure.message})


class Error(TypedDict):
    """An error in Voyage's and Jina's shape."""

    detail: str


class Usage(TypedDict):
    """Tokens of the inputs."""

    total_tokens: int


class MultimodalUsage(Usage):
    """Tokens of texts, and of texts and pictures; a picture has 560 pixels per token, however large it was."""

    text_tokens: int
    image_pixels: int
    video_pixels: int


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


class MultimodalReply(TypedDict):
    """The reply of /v1/multimodalembeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: MultimodalUsage


class Ranked(TypedDict):
    """A document's index and score."""

    relevance_score: float
    index: int
    document: NotRequired[str]


class RerankReply(TypedDict):
    """The reply of /voyage/v1/rerank, best first."""

    object: Literal["list"]
    data: list[Ranked]
    model: str
    usage: Usage


ERRORS = (Errors(Error),)
_MULTIMODAL = Route("POST", "/v1/multimodalembeddings", multimodal_embeddings, MultimodalFields, (MultimodalReply,))
DIALECTS = (
    Dialect("voyage", (_MULTIMODAL,), shape, ERRORS, owns=("/v1/multimodalembeddings",)),
    Dialect(
        "voyage",
        (
            Route("POST", "/v1/embeddings", embeddings, EmbeddingFields, (EmbeddingReply,)),
            _MULTIMODAL,
            Route("POST", "/v1/rerank", rerank, RerankFields, (RerankReply,)),
        ),
        shape,
        ERRORS,
        prefix="/voyage",
        owns=("/voyage",),
    ),
)
