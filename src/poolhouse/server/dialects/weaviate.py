"""Weaviate: vectors of text2vec-transformers and multi2vec-clip, scores of reranker-transformers, one model each.

All of it under /weaviate. Its vectors and probes stand at their own paths too; at /rerank, which vLLM's clients ask with
the same body, the reply holds both forms.

Source: the three inference containers. Their clients name no model: of several, the first that can, answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import EngineFacts
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.content import TextOrContent
from poolhouse.server.call import Call, as_json
from poolhouse.server.dialects import _hosted, health
from poolhouse.server.dialects._fields import Many, Strict
from poolhouse.server.dialects._hosted import EmbedOptions
from poolhouse.server.dialects._pairs import Scored
from poolhouse.server.dialects.health import Model
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire import errors
from poolhouse.server.wire.contract import Errors, Matrix, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure

# The fields that its reranker sends, and no others.
RERANK_FIELDS = frozenset({"query", "documents"})


class Config(Strict):
    """How a vector is wanted."""

    pooling_strategy: str | None = Field(None, description="Without effect: the checkpoint says how it pools.")
    task_type: Literal["query", "passage"] | None = None
    dimensions: int | None = None


class VectorFields(Strict):
    """The body of POST /vectors."""

    text: str
    config: Config = Config()


class VectorizeFields(Strict):
    """The body of POST /vectorize."""

    texts: Many[str] = Field([])
    images: Many[str] = Field([], description="Pictures in base64.")


class RerankFields(Strict):
    """The body of POST /weaviate/rerank."""

    query: str
    documents: Many[str] | None = None
    text: str | None = Field(None, alias="property", description="Instead of documents: one text.")


async def vectors(call: Call, fields: VectorFields) -> Response:
    """The vector of one text."""
    await _use_first(call, lambda facts: "embed" in facts.tasks)
    role = {"query": "query", "passage": "document", None: None}[fields.config.task_type]
    options = EmbedOptions(role, fields.config.dimensions)
    answers = await _hosted.embed(call, [fields.text], options, parameter="text")
    vector = answers[0].array
    return await call.write(lambda: dumps({"text": fields.text, "vector": vector, "dim": len(vector)}), answers)


async def vectorize(call: Call, fields: VectorizeFields) -> Response:
    """The vectors of texts, and those of pictures."""
    await _use_first(call, lambda facts: "embed" in facts.tasks and (facts.pictures or not fields.images))
    texts = len(fields.texts)
    contents: list[TextOrContent] = [*fields.texts, *_hosted.pictures(call.engines, fields.images, "images")]
    requests = _hosted.requests(call, contents, EmbedOptions(), parameter="texts")

    def location(index: int) -> str:
        return f"texts[{index}]" if index < texts else f"images[{index - texts}]"

    answers = await call.answers(requests, location)
    arrays = _hosted.arrays_of(answers)
    return await call.write(lambda: dumps({"textVectors": arrays[:texts], "imageVectors": arrays[texts:]}), answers)


async def rerank(call: Call, fields: RerankFields) -> Response:
    """The score of each document, in the order of the documents."""
    await _use_first(call, lambda facts: "classify" in facts.tasks and facts.labels == 1)
    if (fields.documents is None) == (fields.text is None):
        raise InvalidRequest("Give documents, or one property.", "documents")
    documents = [fields.text] if fields.text is not None else fields.documents or []
    scored = await _hosted.rerank(call, fields.query, documents)
    body: RerankReply | PropertyReply
    if fields.text is None:
        body = in_order(fields.query, documents, scored)
    else:
        body = {"query": fields.query, "property": fields.text, "score": scored.scores[0].score}
    return await call.write(lambda: dumps(body), scored.answers)


async def meta(call: Call) -> Response:
    """The first model, as /v1/models has it."""
    engines = call.engines
    return as_json(health.about(engines, engines.described(await engines.find(None))))


async def live(_: Call) -> Response:
    """204 as long as the process answers."""
    return Response(status_code=204)


async def ready(call: Call) -> Response:
    """204 while every engine can answer, else 503."""
    answer = health.answer(call.engines)
    return Response(status_code=204) if answer.status_code == 200 else answer


def in_order(query: str, documents: Sequence[str], scored: Scored) -> RerankReply:
    """The query, and the score of each document in the order of the documents."""
    pairs = zip(documents, scored.scores, strict=True)
    return {"query": query, "scores": [{"document": document, "score": one.score} for document, one in pairs]}


async def _use_first(call: Call, fits: Callable[[EngineFacts], bool]) -> None:
    """Choose the first model that fits; where none does, the first."""
    await call.use(call.engines.first(fits))


def shape(failure: Failure) -> Response:
    """The containers' error body."""
    return errors.as_json(failure, {"error": failure.message})


class Error(TypedDict):
    """An error in the shape of Weaviate's containers."""

    error: str


class VectorReply(TypedDict):
    """The reply of /vectors."""

    text: str
    vector: Vector
    dim: int


class VectorizeReply(TypedDict):
    """The reply of /vectorize."""

    textVectors: Matrix
    imageVectors: Matrix


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


ERRORS = (Errors(Error),)
_AT_OWN_PATHS = (
    Route("POST", "/vectors", vectors, VectorFields, (VectorReply,), others=("/vectors/",)),
    Route("POST", "/vectorize", vectorize, VectorizeFields, (VectorizeReply,)),
    Route("GET", "/meta", meta, replies=(Model,)),
    Route("GET", "/.well-known/live", live, hidden=True),
    Route("GET", "/.well-known/ready", ready, hidden=True),
)
_RERANK = Route("POST", "/rerank", rerank, RerankFields, (RerankReply, PropertyReply))
DIALECTS = (
    Dialect("weaviate", _AT_OWN_PATHS, shape, ERRORS, owns=("/vectors", "/vectorize")),
    Dialect("weaviate", (*_AT_OWN_PATHS, _RERANK), shape, ERRORS, prefix="/weaviate", owns=("/weaviate",)),
)
