"""/rerank and its twins: one path that several dialects share, told apart by their bodies."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from poolhouse.server.body import read_json
from poolhouse.server.dialects import tei, voyage
from poolhouse.server.dialects.fields import body_schema
from poolhouse.server.dialects.routing import direct_router
from poolhouse.server.dialects.score import RerankFields, answer_rerank
from poolhouse.server.errors import speak
from poolhouse.server.serving import Serving


def router(serving: Serving) -> APIRouter:
    routes = direct_router("scores")

    @routes.post("/rerank", openapi_extra=body_schema(RerankFields, tei.RerankFields, voyage.RerankFields))
    @routes.post("/v1/rerank", include_in_schema=False)
    @routes.post("/v2/rerank", include_in_schema=False)
    async def rerank(http: Request) -> Response:
        """Documents by how well they answer a query, best first."""
        body = await read_json(http, serving.settings)
        if "texts" in body:
            speak(http, tei.shape)
            return await tei.answer_rerank(serving, http, serving.parse(body, tei.RerankFields))
        if voyage.OWN_RERANK_FIELDS & body.keys():
            speak(http, voyage.shape)
            return await voyage.answer_rerank(serving, http, serving.parse(body, voyage.RerankFields))
        return await answer_rerank(serving, http, serving.parse(body, RerankFields))

    return routes
