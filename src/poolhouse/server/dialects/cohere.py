"""Cohere: embed and rerank, versions 1 and 2; all under /cohere, embed at its own paths too.

The other paths of rerank are vLLM's too: there a body of version 1 is recognised by its own fields, and version 2 is
answered in vLLM's form with Cohere's `meta`.

Source: Cohere's API reference. /v2/embed is vLLM's too, which leaves `model` and `input_type` away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NotRequired, cast

import numpy as np
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.content import TextOrContent
from poolhouse.params import PruningParams
from poolhouse.server.call import Call, as_json
from poolhouse.server.dialects import _hosted, _replies, health
from poolhouse.server.dialects._fields import PRUNE, Items, Lenient, Many, Strict
from poolhouse.server.dialects._hosted import EmbeddingType, EmbedOptions
from poolhouse.server.dialects._pairs import Scored, pruned
from poolhouse.server.engines import Engines
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.served import Listed
from poolhouse.server.wire import errors
from poolhouse.server.wire.contract import Errors, Matrix, Pruned
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure

# Fields of version 1 of rerank that no other dialect at /v1/rerank has.
OWN_RERANK_FIELDS = frozenset({"rank_fields", "max_chunks_per_doc"})
Endpoint = Literal["embed", "rerank", "classify"]
# A document of several fields.
Document = dict[str, object]


class EmbedFields(Lenient):
    """The body of POST /v1/embed and /v2/embed."""

    model: str | None = None
    input_type: str | None = Field(None, description="search_query, search_document, image, or the name of a prompt.")
    texts: Many[str] | None = None
    images: Many[str] | None = Field(None, description="Pictures: data URIs, or URLs.")
    inputs: Items[Document] | None = Field(
        None, description="Texts and pictures together: {content: [parts]}, see the parts of messages."
    )
    embedding_types: Many[EmbeddingType] | None = None
    output_dimension: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    truncate: Literal["NONE", "START", "END"] = "END"
    priority: int = Field(0, ge=0, le=999)

    def contents(self, engines: Engines) -> tuple[str, list[TextOrContent]]:
        """One of three fields: its name, and what its items hold.

        Raises:
            InvalidRequest: none of them, or several; more items than one request may hold.
        """
        filled = [name for name in ("texts", "images", "inputs") if getattr(self, name)]
        if len(filled) != 1:
            raise InvalidRequest("Give one of texts, images and inputs, and not an empty one.", "texts")
        (name,) = filled
        if self.images:
            return name, list(_hosted.pictures(engines, self.images, name))
        return name, _hosted.contents_of(engines, self.texts or self.inputs, name)

    def options(self, model_limit: int) -> EmbedOptions:
        """How the items are read; `max_tokens` cannot raise the model's limit."""
        return EmbedOptions(
            self.input_type,
            self.output_dimension,
            truncate=self.truncate if "truncate" in self.model_fields_set else None,
            max_tokens=None if self.max_tokens is None else min(self.max_tokens, model_limit),
            priority=self.priority,
        )


class RerankFields(Strict):
    """The body of POST /cohere/v1/rerank and /cohere/v2/rerank."""

    model: str | None = None
    query: str
    documents: Items[str | Document]
    top_n: int | None = Field(None, ge=1)
    rank_fields: Many[str] | None = Field(None, description="Version 1: fields of documents that are read, in order.")
    return_documents: bool = Field(False, description="Version 1: whether results hold their documents.")
    max_chunks_per_doc: int | None = Field(None, ge=1, description="Without effect: a document is read in one piece.")
    max_tokens_per_doc: int = Field(4096, ge=1)
    priority: int = Field(0, ge=0, le=999)
    prune: object = PRUNE

    def document_texts(self) -> list[str]:
        """The text of each document.

        Raises:
            InvalidRequest: a document without text.
        """
        return [_document_text(document, self.rank_fields, index) for index, document in enumerate(self.documents)]


async def embed_v1(call: Call, fields: EmbedFields) -> Response:
    """One vector per item: bare ones, or by type where `embedding_types` asks."""
    return await _embed(call, fields, 1)


async def embed_v2(call: Call, fields: EmbedFields) -> Response:
    """One vector per item in each of the requested types."""
    return await _embed(call, fields, 2)


async def _embed(call: Call, fields: EmbedFields, version: int) -> Response:
    engine = await call.use(fields.model)
    name, contents = fields.contents(call.engines)
    answers = await _hosted.embed(call, contents, fields.options(engine.facts.max_tokens), parameter=name)
    kinds: list[EmbeddingType] = list(dict.fromkeys(fields.embedding_types or ["float"]))
    bare = version == 1 and not fields.embedding_types
    arrays = _hosted.arrays_of(answers)
    texts = [content for content in contents if isinstance(content, str)]

    def by_type(kind: EmbeddingType) -> object:
        vectors = _hosted.vectors(call, arrays, kind, "embedding_types")
        return vectors if kind == "base64" else np.stack(vectors)

    def render() -> bytes:
        return dumps(
            {
                "id": call.reply_id("embd"),
                "embeddings": by_type("float") if bare else {kind: by_type(kind) for kind in kinds},
                **({"texts": texts} if len(texts) == len(contents) else {}),
                "meta": _meta(version, _billed(answers), answers),
                "response_type": "embeddings_floats" if bare else "embeddings_by_type",
            }
        )

    return await call.write(render, answers)


async def rerank_v1(call: Call, fields: RerankFields) -> Response:
    """Documents by how well they answer a query, best first."""
    return await answer_rerank(call, fields, 1)


async def rerank_v2(call: Call, fields: RerankFields) -> Response:
    """As version 1, without the documents."""
    return await answer_rerank(call, fields, 2)


async def answer_rerank(call: Call, fields: RerankFields, version: int) -> Response:
    """The reply to a body of Cohere's rerank."""
    await call.use(fields.model)
    scored = await _hosted.rerank(
        call,
        fields.query,
        fields.document_texts(),
        # Pruned documents are read whole.
        max_tokens_per_doc=fields.max_tokens_per_doc if PruningParams.parse(fields.prune) is None else None,
        priority=fields.priority,
        prune=fields.prune,
    )
    results = [
        cast("Ranked", {"index": index, "relevance_score": score, **pruned(scored.scores[index])})
        for index, score in scored.best(fields.top_n)
    ]
    if version == 1 and fields.return_documents:
        for ranked in results:
            document = fields.documents[ranked["index"]]
            ranked["document"] = {"text": document} if isinstance(document, str) else document
    body: RerankReply = {
        "id": call.reply_id("rerank"),
        "results": results,
        "meta": rerank_meta(version, scored),
    }
    return await call.write(lambda: dumps(body), scored.answers)


async def models(call: Call) -> Response:
    """The served models; `?endpoint=` leaves those that it can ask."""
    endpoint = call.http.query_params.get("endpoint")
    known = [_model(one) for one in await call.engines.refreshed()]
    return as_json({"models": [model for model in known if endpoint is None or endpoint in model["endpoints"]]})


async def model(call: Call) -> Response:
    """One of the served models."""
    return as_json(_model(await health.named(call.engines, call.path_params["model"])))


def rerank_meta(version: int, scored: Scored) -> Meta:
    """The `meta` of a rerank; a search unit is a query with up to a hundred documents."""
    return _meta(version, {"search_units": math.ceil(len(scored.scores) / 100)}, scored.answers)


def _billed(answers: Sequence[Answer]) -> BilledUnits:
    """Tokens of texts, and of pictures where there are any."""
    tokens, of_pictures = _replies.tokens_of(answers), _replies.picture_tokens_of(answers)
    return (
        {"input_tokens": tokens - of_pictures, "image_tokens": of_pictures} if of_pictures else {"input_tokens": tokens}
    )


def _meta(version: int, units: BilledUnits, answers: Sequence[Answer]) -> Meta:
    meta: Meta = {"api_version": {"version": "1" if version == 1 else "2"}, "billed_units": units}
    cut = _replies.truncated_of(answers)
    if cut:
        meta["warnings"] = [f"{cut} of {len(answers)} inputs were longer than the limit, and cut."]
    return meta


def _document_text(document: str | Document, fields: Sequence[str] | None, index: int) -> str:
    if isinstance(document, str):
        return document
    texts: list[str] = []
    for name in fields or ["text"]:
        text = document.get(name)
        if not isinstance(text, str):
            raise InvalidRequest(f"documents[{index}] has no text '{name}'.", f"documents[{index}]")
        texts.append(text)
    return "\n".join(texts)


def _model(listed: Listed) -> Model:
    facts, can = listed.facts, dict[Endpoint, bool]()
    # What a model can do is known once it was loaded.
    if facts is not None:
        # Whatever has vectors, or one score for a pair, reranks.
        embeds = "embed" in facts.tasks
        can = {
            "embed": embeds,
            "rerank": embeds or "token_embed" in facts.tasks or facts.labels == 1,
            "classify": facts.labels > 1,
        }
    return {
        "name": listed.name,
        "endpoints": [endpoint for endpoint, there in can.items() if there],
        "finetuned": False,
        "context_length": None if facts is None else facts.max_tokens,
        "tokenizer_url": None,
        "default_endpoints": [],
    }


def shape(failure: Failure) -> Response:
    """Cohere's error body."""
    return errors.as_json(failure, {"message": failure.message})


class Error(TypedDict):
    """An error in Cohere's shape."""

    message: str


class ApiVersion(TypedDict):
    """Of Cohere's API."""

    version: Literal["1", "2"]


class BilledUnits(TypedDict):
    """What was read: tokens of texts and of pictures, or one search unit per hundred documents."""

    input_tokens: NotRequired[int]
    image_tokens: NotRequired[int]
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
    """The reply of /v1/embed and /v2/embed; bare vectors in version 1, where no types are requested.

    texts: left out where an item has a picture.
    """

    id: str
    embeddings: Matrix | EmbeddingsByType
    texts: NotRequired[list[str]]
    meta: Meta
    response_type: Literal["embeddings_floats", "embeddings_by_type"]


class Ranked(Pruned):
    """A document's index and score."""

    index: int
    relevance_score: float
    document: NotRequired[Document]


class RerankReply(TypedDict):
    """The reply of /v1/rerank and /v2/rerank, best first."""

    id: str
    results: list[Ranked]
    meta: Meta


class Model(TypedDict):
    """A served model, and the endpoints that it can answer."""

    name: str
    endpoints: list[Endpoint]
    finetuned: bool
    context_length: int | None
    tokenizer_url: None
    default_endpoints: list[str]


class Models(TypedDict):
    """The served models."""

    models: list[Model]


ERRORS = (Errors(Error),)
_EMBED = (
    Route("POST", "/v1/embed", embed_v1, EmbedFields, (EmbedReply,)),
    Route("POST", "/v2/embed", embed_v2, EmbedFields, (EmbedReply,)),
)
_OTHERS = (
    Route("POST", "/v1/rerank", rerank_v1, RerankFields, (RerankReply,)),
    Route("POST", "/v2/rerank", rerank_v2, RerankFields, (RerankReply,)),
    Route(
        "GET",
        "/v1/models",
        models,
        replies=(Models,),
        query={"endpoint": "Leave the models that it can ask."},
    ),
    Route("GET", "/v1/models/{model:path}", model, replies=(Model,), errors=(Errors(Error, (404,)),)),
)
DIALECTS = (
    Dialect("cohere", _EMBED, shape, ERRORS),
    Dialect("cohere", (*_EMBED, *_OTHERS), shape, ERRORS, prefix="/cohere", owns=("/cohere",)),
)
