"""Jina: embeddings, multi-vector and rerank under /jina; /v1/multi-vector at its own path too.

Source: Jina's API reference. Its other paths are OpenAI's and vLLM's; those understand Jina's fields as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NotRequired, cast

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest
from poolhouse.outputs import Array
from poolhouse.server.call import Call
from poolhouse.server.dialects import _hosted, _replies, openai
from poolhouse.server.dialects._fields import PRUNE, Items, Many, Strict
from poolhouse.server.dialects._hosted import EmbeddingType, EmbedOptions
from poolhouse.server.dialects._pairs import pruned
from poolhouse.server.dialects.voyage import Error
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.contract import Cut, Errors, Matrix, Pruned, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json
from poolhouse.tasks import Task

_INPUT = "A text, {text}, {image: a URL, a data URI or base64}, or a list of them."


class EmbeddingFields(Strict):
    """The body of POST /jina/v1/embeddings."""

    model: str | None = None
    input: object = Field(description=_INPUT)
    task: str | None = Field(None, description="retrieval.query, retrieval.passage, ... or the name of a prompt.")
    dimensions: int | None = None
    normalized: bool | None = None
    embedding_type: EmbeddingType | Annotated[Many[EmbeddingType], Field(min_length=1)] = "float"
    late_chunking: bool = False
    truncate: bool = Field(False, description="Cut texts over the limit instead of refusing them.")
    return_multivector: bool = False

    @property
    def options(self) -> EmbedOptions:
        """How the texts are read."""
        return EmbedOptions(self.task, self.dimensions, self.normalized, None if self.truncate else "NONE")


class MultiVectorFields(Strict):
    """The body of POST /v1/multi-vector."""

    model: str | None = None
    input: object = Field(description=_INPUT)
    input_type: Literal["query", "document"] | None = None
    dimensions: int | None = None
    embedding_type: EmbeddingType = "float"
    truncate: bool = True


class RerankFields(Strict):
    """The body of POST /jina/v1/rerank."""

    model: str | None = None
    query: str | dict[str, object] = Field(description="A text, {text} or {image}.")
    documents: Items[str | dict[str, object]] = Field(description="Texts, {text} or {image}.")
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
    prune: object = PRUNE


async def embeddings(call: Call, fields: EmbeddingFields) -> Response:
    """One vector per input, or one per token where `return_multivector` asks."""
    if fields.late_chunking and fields.return_multivector:
        raise InvalidRequest("late_chunking gives a vector per chunk; leave return_multivector out.", "late_chunking")
    await call.use(fields.model)
    contents = _hosted.contents_of(call.engines, fields.input, "input")
    named = fields.embedding_type
    kinds: list[EmbeddingType] = list(dict.fromkeys([named] if isinstance(named, str) else named))
    if fields.late_chunking:
        read = await openai.read(call, _hosted.requests(call, contents, fields.options))
        return await _write(call, [read.whole], read.chunks, kinds)
    task: Task = "token_embed" if fields.return_multivector else "embed"
    answers = await _hosted.embed(call, contents, fields.options, task=task)
    return await _write(call, answers, _hosted.arrays_of(answers), kinds)


async def multi_vector(call: Call, fields: MultiVectorFields) -> Response:
    """One vector per token of each input."""
    await call.use(fields.model)
    options = EmbedOptions(fields.input_type, fields.dimensions, truncate=None if fields.truncate else "NONE")
    contents = _hosted.contents_of(call.engines, fields.input, "input")
    answers = await _hosted.embed(call, contents, options, task="token_embed")
    return await _write(call, answers, _hosted.arrays_of(answers), [fields.embedding_type])


async def _write(
    call: Call, answers: Sequence[Answer], arrays: Sequence[Array], kinds: Sequence[EmbeddingType]
) -> Response:
    """One object per array; of several kinds, its vectors by kind."""
    name = "embedding" if arrays[0].ndim == 1 else "embeddings"
    cuts = _replies.cuts(answers, len(arrays))

    def render() -> bytes:
        by_kind = {kind: _hosted.vectors(call, arrays, kind, "embedding_type") for kind in kinds}
        data: list[dict[str, object]] = []
        for index, cut in enumerate(cuts):
            forms = {kind: vectors[index] for kind, vectors in by_kind.items()}
            data.append({"object": name, "index": index, name: forms if len(kinds) > 1 else forms[kinds[0]], **cut})
        return dumps({"model": call.engine.facts.name, "object": "list", "usage": _usage(answers), "data": data})

    return await call.write(render, answers)


async def rerank(call: Call, fields: RerankFields) -> Response:
    """Documents by how well they answer a query, best first."""
    engine = await call.use(fields.model)
    query = _hosted.content_of(fields.query, "query", "query")
    documents = _hosted.contents_of(call.engines, fields.documents, "documents")
    scored = await _hosted.rerank(call, query, documents, prune=fields.prune)
    results = [
        cast("Ranked", {"index": index, "relevance_score": score, **pruned(scored.scores[index])})
        for index, score in scored.best(fields.top_n)
    ]
    if fields.return_documents:
        for ranked in results:
            ranked["document"] = _echo(fields.documents[ranked["index"]])
    body: RerankReply = {
        "model": engine.facts.name,
        "object": "list",
        "usage": _usage(scored.answers),
        "results": results,
    }
    return await call.write(lambda: dumps(body), scored.answers)


def _echo(document: str | dict[str, object]) -> Document:
    """A document in the reply: as it was given, a bare text as {text}."""
    if isinstance(document, str):
        return {"text": document}
    return cast("Document", {name: document[name] for name in ("text", "image", "content") if name in document})


def _usage(answers: Sequence[Answer]) -> Usage:
    tokens = _replies.tokens_of(answers)
    return {"total_tokens": tokens, "prompt_tokens": tokens}


def shape(failure: Failure) -> Response:
    """Jina's error body; wrong fields are a 422, and an unknown model a 400."""
    return as_json(_hosted.with_their_statuses(failure), {"detail": failure.message})


class Usage(TypedDict):
    """Tokens of the inputs."""

    total_tokens: int
    prompt_tokens: int


class Embedding(Cut):
    """The vector of an input, as numbers or in base64; by kind where several kinds are requested."""

    object: Literal["embedding"]
    index: int
    embedding: Vector | str | dict[EmbeddingType, Vector | str]


class Embeddings(Cut):
    """The vectors of an input's tokens; by kind where several kinds are requested."""

    object: Literal["embeddings"]
    index: int
    embeddings: Matrix | str | dict[EmbeddingType, Matrix | str]


class EmbeddingReply(TypedDict):
    """The reply of /jina/v1/embeddings and /v1/multi-vector."""

    model: str
    object: Literal["list"]
    usage: Usage
    data: list[Embedding] | list[Embeddings]


class Document(TypedDict, total=False):
    """A document of the request."""

    text: str
    image: str
    content: object


class Ranked(Pruned):
    """A document's index and score."""

    index: int
    relevance_score: float
    document: NotRequired[Document]


class RerankReply(TypedDict):
    """The reply of /jina/v1/rerank, best first."""

    model: str
    object: Literal["list"]
    usage: Usage
    results: list[Ranked]


ERRORS = (Errors(Error),)
_MULTI_VECTOR = Route("POST", "/v1/multi-vector", multi_vector, MultiVectorFields, (EmbeddingReply,))
DIALECTS = (
    Dialect("jina", (_MULTI_VECTOR,), shape, ERRORS),
    Dialect(
        "jina",
        (
            _MULTI_VECTOR,
            Route("POST", "/v1/embeddings", embeddings, EmbeddingFields, (EmbeddingReply,)),
            Route("POST", "/v1/rerank", rerank, RerankFields, (RerankReply,)),
        ),
        shape,
        ERRORS,
        prefix="/jina",
        owns=("/jina",),
    ),
)
