"""Replies of Voyage's routes."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from poolhouse.server.dialects.contract import Contract, Contracts, Cut, Errors, Vector


class Error(TypedDict):
    """An error in Voyage's and Jina's shape."""

    detail: str


class Usage(TypedDict):
    """Tokens of the inputs."""

    total_tokens: int


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


class Ranked(TypedDict):
    """A document's place and score."""

    relevance_score: float
    index: int
    document: NotRequired[str]


class RerankReply(TypedDict):
    """The reply of /voyage/v1/rerank, best first."""

    object: Literal["list"]
    data: list[Ranked]
    model: str
    usage: Usage


ERRORS = Errors(Error)
CONTRACTS: Contracts = {
    "/voyage/v1/embeddings": Contract((EmbeddingReply,), (ERRORS,)),
    "/voyage/v1/rerank": Contract((RerankReply,), (ERRORS,)),
}
