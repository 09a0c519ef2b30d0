"""/rerank and its twins: one path that several dialects share, told apart by their bodies."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from poolhouse.server.body import read_json
from poolhouse.server.dialects import cohere, tei, voyage, weaviate
from poolhouse.server.dialects.fields import body_schema
from poolhouse.server.dialects.pairs import Scored
from poolhouse.server.dialects.routing import direct_router
from poolhouse.server.dialects.score import RerankFields, answer_rerank
from poolhouse.server.errors import speak
from poolhouse.server.serving import Serving

_DIALECTS = (RerankFields, tei.RerankFields, voyage.RerankFields, cohere.RerankFields)
_BODIES = body_schema(*_DIALECTS)


def router(serving: Serving) -> APIRouter:
    routes = direct_router("scores")

    @routes.post("/rerank", openapi_extra=body_schema(*_DIALECTS, weaviate.RerankFields))
    async def rerank(http: Request) -> Response:
        """Documents by how well they answer a query, best first."""
        return await _answer(serving, http, 1, of_weaviate=True)

    @routes.post("/v1/rerank", include_in_schema=False)
    async def rerank_v1(http: Request) -> Response:
        """As /rerank, where Weaviate does not ask."""
        return await _answer(serving, http, 1)

    @routes.post("/v2/rerank", openapi_extra=_BODIES)
    async def rerank_v2(http: Request) -> Response:
        """Documents by how well they answer a query, best first, with the `meta` of Cohere's version 2."""
        return await _answer(serving, http, 2)

    return routes


async def _answer(serving: Serving, http: Request, version: int, of_weaviate: bool = False) -> Response:
    """The answer in the dialect of the body.

    version: of Cohere's API, which the path says. of_weaviate: whether Weaviate asks at the path.
    """
    body = await read_json(http, serving.settings)
    given = {name for name, value in body.items() if value is not None}
    if "texts" in given:
        speak(http, tei.shape)
        return await tei.answer_rerank(serving, http, serving.parse(body, tei.RerankFields))
    if voyage.OWN_RERANK_FIELDS & given:
        speak(http, voyage.shape)
        return await voyage.answer_rerank(serving, http, serving.parse(body, voyage.RerankFields))
    if cohere.OWN_RERANK_FIELDS & given:
        speak(http, cohere.shape)
        return await cohere.answer_rerank(serving, http, serving.parse(body, cohere.RerankFields), version)
    if of_weaviate and "property" in given:
        speak(http, weaviate.shape)
        return await weaviate.answer_rerank(serving, http, serving.parse(body, weaviate.RerankFields))
    fields = serving.parse(body, RerankFields)

    def more(scored: Scored) -> dict[str, Any]:
        """What stands beside vLLM's reply, for clients of others that cannot be told from vLLM's."""
        if version > 1:
            return {"meta": cohere.rerank_meta(version, scored)}
        if of_weaviate and given == weaviate.RERANK_FIELDS:
            sides = fields.sides()
            return weaviate.in_order(sides.queries[0], sides.documents, scored)
        return {}

    return await answer_rerank(serving, http, fields, more)
