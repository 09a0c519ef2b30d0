"""/rerank and its twins: one path that several dialects share, told apart by their bodies."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from poolhouse.server.body import read_json
from poolhouse.server.dialects import cohere, tei, voyage
from poolhouse.server.dialects.fields import body_schema
from poolhouse.server.dialects.routing import direct_router
from poolhouse.server.dialects.score import RerankFields, answer_rerank
from poolhouse.server.errors import speak
from poolhouse.server.serving import Serving

_BODIES = body_schema(RerankFields, tei.RerankFields, voyage.RerankFields, cohere.RerankFields)


def router(serving: Serving) -> APIRouter:
    routes = direct_router("scores")

    @routes.post("/rerank", openapi_extra=_BODIES)
    @routes.post("/v1/rerank", include_in_schema=False)
    async def rerank(http: Request) -> Response:
        """Documents by how well they answer a query, best first."""
        return await _answer(serving, http, 1)

    @routes.post("/v2/rerank", openapi_extra=_BODIES)
    async def rerank_v2(http: Request) -> Response:
        """Documents by how well they answer a query, best first, with the `meta` of Cohere's version 2."""
        return await _answer(serving, http, 2)

    return routes


async def _answer(serving: Serving, http: Request, version: int) -> Response:
    """The answer in the dialect of the body. version: of Cohere's API, which the path says."""
    body = await read_json(http, serving.settings)
    if "texts" in body:
        speak(http, tei.shape)
        return await tei.answer_rerank(serving, http, serving.parse(body, tei.RerankFields))
    if voyage.OWN_RERANK_FIELDS & body.keys():
        speak(http, voyage.shape)
        return await voyage.answer_rerank(serving, http, serving.parse(body, voyage.RerankFields))
    if cohere.OWN_RERANK_FIELDS & body.keys():
        speak(http, cohere.shape)
        return await cohere.answer_rerank(serving, http, serving.parse(body, cohere.RerankFields), version)
    meta = partial(cohere.rerank_meta, version) if version > 1 else None
    return await answer_rerank(serving, http, serving.parse(body, RerankFields), meta)
