"""Replies of TEI's routes."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from poolhouse.server.dialects.openai import BYTES, METADATA, EmbeddingReply
from poolhouse.server.wire.contract import STATUSES, Contract, Contracts, Errors, Matrix, Vector
from poolhouse.tasks import Task

Kind = Literal["Empty", "Overloaded", "Validation", "Backend", "Unhealthy"]


class Error(TypedDict):
    """An error in TEI's shape."""

    error: str
    error_type: Kind


class OpenAIError(TypedDict):
    """An error of TEI's OpenAI route."""

    message: str
    code: int
    type: Kind


class Prediction(TypedDict):
    """A label and its score."""

    score: float
    label: str


class Rank(TypedDict):
    """A text's place and score."""

    index: int
    score: float
    text: NotRequired[str]


class Info(TypedDict):
    """The model and the server's limits."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[Literal["embedding", "classifier", "reranker"], dict[str, Any]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int | None
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int | None
    version: str
    sha: str | None
    docker_label: str | None
    tasks: list[Task]
    max_body_bytes: int
    request_timeout_seconds: float


class Entry(TypedDict):
    """An entry of a sparse vector."""

    index: int
    value: float


class Token(TypedDict):
    """A token, and the characters that it stands for; special ones stand for none."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


EmbedReply = Matrix
EmbedSparseReply = list[list[Entry]]
TokenizeReply = list[list[Token]]
DecodeReply = list[str]
EmbedAllReply = list[Matrix]
PredictReply = list[Prediction] | list[list[Prediction]]
SimilarityReply = Vector
RerankReply = list[Rank]

_STATUSES = (*STATUSES, 422, 424)
ERRORS = Errors(Error, _STATUSES)
_COST = {
    "x-compute-type": "The device.",
    "x-compute-characters": "Characters of the inputs.",
    "x-compute-tokens": "Tokens of the inputs.",
    "x-compute-time": "Milliseconds in all, as x-total-time.",
    "x-total-time": "Milliseconds in all.",
    "x-tokenization-time": "Milliseconds, the mean of the inputs.",
    "x-queue-time": "Milliseconds, the mean of the inputs.",
    "x-inference-time": "Milliseconds, the mean of the inputs.",
}
_OWN: Contracts = {
    "/embed": Contract((EmbedReply,), (ERRORS,), headers=_COST),
    "/embed_all": Contract((EmbedAllReply,), (ERRORS,), headers=_COST),
    "/embed_sparse": Contract((EmbedSparseReply,), (ERRORS,), headers=_COST),
    "/decode": Contract((DecodeReply,), (ERRORS,)),
    "/predict": Contract((PredictReply,), (ERRORS,), headers=_COST),
    "/similarity": Contract((SimilarityReply,), (ERRORS,), headers=_COST),
    "/info": Contract((Info,), (Errors(Error, (404,)),), query={"model": "A served model; none takes the first."}),
}
_UNDER_TEI: Contracts = {
    **_OWN,
    "/rerank": Contract((RerankReply,), (ERRORS,), headers=_COST),
    "/tokenize": Contract((TokenizeReply,), (ERRORS,)),
    "/v1/embeddings": Contract((EmbeddingReply,), (Errors(OpenAIError, _STATUSES),), BYTES, {**METADATA, **_COST}),
}
CONTRACTS: Contracts = {**_OWN, **{f"/tei{path}": contract for path, contract in _UNDER_TEI.items()}}
