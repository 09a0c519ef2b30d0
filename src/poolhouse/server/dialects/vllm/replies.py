"""Replies of vLLM's routes, and of those that tell dialects apart by the body."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from poolhouse.server.dialects import cohere, voyage, weaviate
from poolhouse.server.dialects.openai import BYTES, METADATA, EmbeddingReply, LateChunking, List
from poolhouse.server.dialects.tei import replies as tei_replies
from poolhouse.server.dialects.vllm.pooling import Word
from poolhouse.server.wire.contract import Contract, Contracts, Cut, Errors, Matrix, Vector


class TokenUsage(TypedDict):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int


class Entry(TypedDict):
    """An entry of a sparse vector; features without names have no token."""

    token_id: int
    token: str | None
    weight: float


Answer = Vector | Matrix | list[Entry] | str


class Pooled(Cut):
    """The answer to an input: a row, a row per token, either in base64 with its shape, or the entries of a sparse vector."""

    index: int
    object: Literal["pooling"]
    data: Answer | dict[Word, Answer]
    shape: NotRequired[list[int]]
    shapes: NotRequired[dict[Word, list[int]]]
    late_chunking: NotRequired[LateChunking]


class PoolingReply(List):
    """The reply of /pooling; `data` of an item goes by task where `tasks` were asked for."""

    data: list[Pooled]


class PluginReply(TypedDict):
    """The reply of /pooling to the task `plugin`."""

    request_id: str
    created_at: int
    data: Any


class Labelled(Cut):
    """The likeliest label of an input, and the probability of every label."""

    index: int
    label: str | None
    probs: Vector
    num_classes: int


class ClassifyReply(List):
    """The reply of /classify."""

    data: list[Labelled]


class Entity(TypedDict):
    """A span of a text, in characters."""

    label: str
    score: float
    text: str
    start: int
    end: int


class Entities(Cut):
    """The entities of an input."""

    index: int
    entities: list[Entity]


class ClassifyTokensReply(List):
    """The reply of /classify_tokens."""

    data: list[Entities]


class Score(Cut):
    """The score of a pair."""

    index: int
    object: Literal["score"]
    score: float


class ScoreReply(List):
    """The reply of /score."""

    data: list[Score]


class TokenizeReply(TypedDict):
    """The reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(TypedDict):
    """The reply of /detokenize."""

    prompt: str


class RankedDocument(TypedDict):
    """A document as it was given."""

    text: str
    multi_modal: None


class Ranked(Cut):
    """A document's place and score."""

    index: int
    document: NotRequired[RankedDocument]
    relevance_score: float


class RerankReply(TypedDict):
    """The reply of /rerank, best first; that of /v2/rerank has Cohere's `meta`.

    To `query` and `documents` alone it has `scores` too, as Weaviate reads them: in the order of the documents.
    """

    id: str
    model: str
    usage: TokenUsage
    results: list[Ranked]
    meta: NotRequired[cohere.Meta]
    query: NotRequired[str]
    scores: NotRequired[list[weaviate.DocumentScore]]


_SHARED = (Errors(), tei_replies.ERRORS)
_ANY = (
    *(EmbeddingReply, PoolingReply, PluginReply, ClassifyReply, ScoreReply, RerankReply),
    *(tei_replies.EmbedReply, tei_replies.PredictReply, tei_replies.SimilarityReply, tei_replies.RerankReply),
    tei_replies.EmbedSparseReply,
)
_RERANK = Contract(
    (RerankReply, tei_replies.RerankReply, voyage.RerankReply, cohere.RerankReply),
    (*_SHARED, voyage.ERRORS, *cohere.ERRORS),
)

CONTRACTS: Contracts = {
    "/pooling": Contract((PoolingReply, PluginReply), media=BYTES, headers=METADATA),
    "/classify": Contract((ClassifyReply,)),
    "/classify_tokens": Contract((ClassifyTokensReply,)),
    "/score": Contract((ScoreReply,)),
    "/rerank": replace(
        _RERANK,
        replies=(*_RERANK.replies, weaviate.PropertyReply),
        errors=(*_RERANK.errors, Errors(weaviate.Error)),
    ),
    "/v2/rerank": _RERANK,
    "/tokenize": Contract((TokenizeReply, tei_replies.TokenizeReply), _SHARED),
    "/detokenize": Contract((DetokenizeReply,)),
    "/invocations": Contract(_ANY, _SHARED, BYTES, METADATA),
}
