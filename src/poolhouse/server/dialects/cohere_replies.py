"""Replies of Cohere's routes."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from poolhouse.server.dialects.contract import Contract, Contracts, Errors, Matrix


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
