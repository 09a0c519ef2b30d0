"""/invocations: one path for every body, as SageMaker calls it. What fits first, answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from poolhouse.errors import InvalidRequest
from poolhouse.server.body import read_json
from poolhouse.server.dialects import classify, openai, pooling, score, tei
from poolhouse.server.dialects.fields import body_schema
from poolhouse.server.dialects.routing import direct_router
from poolhouse.server.errors import speak
from poolhouse.server.serving import Engine, Serving

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


def _routes(engine: Engine, task: Any) -> list[_Route]:
    """In vLLM's order, but that a body is for /pooling whose task is another than its texts have anyway."""
    own: str | None = None
    if "embed" in engine.tasks:
        own, of_texts = "embed", _Route(openai.EmbeddingFields, openai.answer, _PROMPTS)
    elif "classify" in engine.tasks:
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
