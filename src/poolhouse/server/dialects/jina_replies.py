"""Replies of Jina's routes."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from poolhouse.server.dialects.contract import Contract, Contracts, Cut, Errors, Matrix, Vector
from poolhouse.server.dialects.hosted import Kind
from poolhouse.server.dialects.voyage_replies import ERRORS, Error


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
