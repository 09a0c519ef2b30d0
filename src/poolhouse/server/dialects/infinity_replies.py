"""Replies of Infinity's routes."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from poolhouse.server.dialects.contract import Contract, Contracts, Cut, Errors, Matrix, Vector


class Problem(TypedDict):
    """What went wrong."""

    message: str
    type: None
    param: str | None
    code: int


class Error(TypedDict):
    """An error in Infinity's shape."""

    error: Problem


class WrongField(TypedDict):
    """A field of a body that is wrong, as FastAPI tells it."""

    type: str
    loc: list[str | int]
    msg: str


class WrongFields(TypedDict):
    """An error of a body whose fields are wrong."""

    detail: list[WrongField]


class Usage(TypedDict):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int


class Tail(TypedDict):
    """What all replies end with."""

    model: str
    usage: Usage
    id: str
    created: int


class Embedding(Cut):
    """The vector of an input, or those of its tokens; as numbers or in base64."""

    object: Literal["embedding"]
    embedding: Vector | Matrix | str
    index: int


class EmbeddingReply(Tail):
    """The reply of /infinity/embeddings."""

    object: Literal["list"]
    data: list[Embedding]


class Ranked(TypedDict):
    """A document's place and score."""

    relevance_score: float
    index: int
    document: str | None


class RerankReply(Tail):
    """The reply of /infinity/rerank, best first."""

    object: Literal["rerank"]
    results: list[Ranked]


class Label(TypedDict):
    """A label and its score."""

    score: float
    label: str


class ClassifyReply(Tail):
    """The reply of /infinity/classify: every label of each input, likeliest first."""

    object: Literal["classify"]
    data: list[list[Label]]


class Stats(TypedDict):
    """What waits for a model."""

    queue_fraction: float
    queue_absolute: int
    results_pending: int
    batch_size: int


class Model(TypedDict):
    """A served model."""

    id: str
    stats: Stats
    object: Literal["model"]
    owned_by: Literal["infinity"]
    created: int
    backend: str
    capabilities: list[Literal["embed", "classify", "rerank"]]


class ModelsReply(TypedDict):
    """The reply of /infinity/models."""

    data: list[Model]
    object: Literal["list"]


class HealthReply(TypedDict):
    """The reply of /infinity/health."""

    unix: float


_ERRORS = (Errors(Error), Errors(WrongFields, (422,)))
CONTRACTS: Contracts = {
    "/infinity/health": Contract((HealthReply,), ()),
    "/infinity/models": Contract((ModelsReply,), ()),
    "/infinity/embeddings": Contract((EmbeddingReply,), _ERRORS),
    "/infinity/rerank": Contract((RerankReply,), _ERRORS),
    "/infinity/classify": Contract((ClassifyReply,), _ERRORS),
}
