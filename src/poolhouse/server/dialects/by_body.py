"""/invocations: one path for every body, as SageMaker calls it. What fits first, answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from poolhouse.engine.interface import PoolingEngine
from poolhouse.errors import InvalidRequest
from poolhouse.server.dialects import cohere, openai, tei, voyage, weaviate
from poolhouse.server.dialects._fields import body_schema
from poolhouse.server.dialects._pairs import Scored
from poolhouse.server.dialects.vllm import classify, pooling, score
from poolhouse.server.dialects.vllm.score import RerankFields, answer_rerank
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.body import read_json
from poolhouse.server.wire.errors import speak

Answer = Callable[[Serving, Request, Any], Awaitable[Response]]


def router(serving: Serving) -> APIRouter:
    routes = direct_router("sagemaker")

    @routes.post("/invocations", openapi_extra=body_schema(*_BODIES))
    async def invocations(http: Request) -> Response:
        """The reply of whichever route the body is for."""
        body = await read_json(http, serving.settings)
        if "inputs" in body or "texts" in body:
            speak(http, tei.shape)
            return await tei.by_model(serving, http, body)
        model = body.get("model")
        engine = serving.engine(model if isinstance(model, str) else None)
        routes = _routes(engine, body.get("task"))
        for route in routes:
            if route.fits(body):
                return await route.answer(serving, http, serving.parse(body, route.fields))
        known = dict.fromkeys(route.fields.__name__.removesuffix("Fields") for route in routes)
        raise InvalidRequest(f"Cannot find suitable handler for request. Expected one of: {list(known)}")

    return routes


_PROMPTS = (("input",), ("messages",))
_BODIES = (
    *(openai.EmbeddingFields, pooling.PoolingFields, classify.ClassifyFields, score.RerankFields, score.ScoreFields),
    *(tei.EmbedFields, tei.PredictFields, tei.SimilarityFields, tei.RerankFields, tei.TokenFields),
)


@dataclass(frozen=True, slots=True)
class _Route:
    """A route, and the fields by which a body is told to be for it: all of one of these groups."""

    fields: type[BaseModel]
    answer: Answer
    groups: tuple[tuple[str, ...], ...]

    def fits(self, body: dict[str, Any]) -> bool:
        return any(all(name in body for name in group) for group in self.groups)


def _routes(engine: PoolingEngine, task: Any) -> list[_Route]:
    """In vLLM's order, but that a body is for /pooling whose task is another than its texts have anyway."""
    own: str | None = None
    if "embed" in engine.facts.tasks:
        own, of_texts = "embed", _Route(openai.EmbeddingFields, openai.answer, _PROMPTS)
    elif "classify" in engine.facts.tasks:
        own, of_texts = "classify", _Route(classify.ClassifyFields, classify.answer_classify, _PROMPTS)
    else:
        of_texts = _Route(pooling.PoolingFields, pooling.answer, _PROMPTS)
    of_tasks = (("tasks",),) if task in (None, own) else (("task",), ("tasks",))
    return [
        _Route(pooling.PoolingFields, pooling.answer, of_tasks),
        of_texts,
        _Route(score.RerankFields, score.answer_rerank, (("query", "documents"),)),
        _Route(score.ScoreFields, score.answer_score, score.SPELLINGS),
        _Route(pooling.PoolingFields, pooling.answer, (("data",),)),
    ]


_DIALECTS = (RerankFields, tei.RerankFields, voyage.RerankFields, cohere.RerankFields)
_RERANK_BODIES = body_schema(*_DIALECTS)


def rerank_router(serving: Serving) -> APIRouter:
    routes = direct_router("scores")

    @routes.post("/rerank", openapi_extra=body_schema(*_DIALECTS, weaviate.RerankFields))
    async def rerank(http: Request) -> Response:
        """Documents by how well they answer a query, best first."""
        return await _answer(serving, http, 1, of_weaviate=True)

    @routes.post("/v1/rerank", include_in_schema=False)
    async def rerank_v1(http: Request) -> Response:
        """As /rerank, where Weaviate does not ask."""
        return await _answer(serving, http, 1)

    @routes.post("/v2/rerank", openapi_extra=_RERANK_BODIES)
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
