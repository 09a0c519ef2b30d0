"""NVIDIA's ranking, which answers with logits: /v1/ranking, and /v1/retrieval/{model}/reranking as its hosted API has it.

Its embeddings are OpenAI's, which understand NVIDIA's fields.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from poolhouse.server.dialects import _hosted, _replies
from poolhouse.server.dialects._fields import Many, body_schema
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.contract import Contract, Contracts
from poolhouse.server.wire.encoding import dumps


class Text(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    text: str


class RankingFields(BaseModel):
    """The body of POST /v1/ranking."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    query: Text
    passages: Many[Text] = Field(min_length=1)
    truncate: Literal["NONE", "END"] = "NONE"
    top_k: int | None = Field(None, ge=1, description="How many of the best to give; LiteLLM asks for it.")


def router(serving: Serving) -> APIRouter:
    routes = direct_router("nvidia")

    @routes.post("/v1/ranking", openapi_extra=body_schema(RankingFields))
    async def ranking(http: Request) -> Response:
        """Passages by how well they answer a query, best first."""
        return await _rank(serving, http, await serving.read(http, RankingFields), None)

    @routes.post("/v1/retrieval/{model:path}/reranking", openapi_extra=body_schema(RankingFields))
    async def reranking(http: Request) -> Response:
        """The same of the model that the path names, where the body names none."""
        return await _rank(serving, http, await serving.read(http, RankingFields), http.path_params["model"])

    return routes


async def _rank(serving: Serving, http: Request, fields: RankingFields, model: str | None) -> Response:
    engine = serving.engine(fields.model or model)
    passages = [passage.text for passage in fields.passages]
    scored = await _hosted.rerank(
        serving, http, engine, fields.query.text, passages, truncate=fields.truncate == "END", use_activation=False
    )
    rankings = [{"index": place, "logit": scored.scores[place].score} for place in scored.ranked(fields.top_k)]
    return await _replies.write(serving, lambda: dumps({"rankings": rankings}), scored.answers)


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
