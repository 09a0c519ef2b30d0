"""Replies of NVIDIA's ranking."""

from __future__ import annotations

from typing_extensions import TypedDict

from poolhouse.server.dialects.contract import Contract, Contracts


class Ranking(TypedDict):
    """A passage's place and logit."""

    index: int
    logit: float


class RankingReply(TypedDict):
    """The reply of /v1/ranking, best first."""

    rankings: list[Ranking]


CONTRACTS: Contracts = {
    "/v1/ranking": Contract((RankingReply,)),
    "/v1/retrieval/{model}/reranking": Contract((RankingReply,)),
}
