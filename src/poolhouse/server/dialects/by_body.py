"""Shared paths: /invocations (SageMaker) and /rerank, where the fields of the body choose the dialect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired

from pydantic import BaseModel
from starlette.responses import Response

from poolhouse.engine.interface import PoolingEngine
from poolhouse.errors import InvalidRequest
from poolhouse.server.call import Call, JsonObject
from poolhouse.server.dialects import cohere, openai, tei, voyage, weaviate
from poolhouse.server.dialects._pairs import Scored
from poolhouse.server.dialects.vllm import classify, pooling, score
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.contract import Errors


async def invocations(call: Call, body: JsonObject) -> Response:
    """The reply of whichever route the body is for."""
    if "inputs" in body or "texts" in body:
        call.speak(tei.shape)
        return await tei.by_model(call, body)
    model = body.get("model")
    targets = _targets(await call.use(model if isinstance(model, str) else None), body.get("task"))
    for target in targets:
        if target.fits(body):
            return await target.answer(call, call.parse(body, target.fields))
    known = dict.fromkeys(target.fields.__name__.removesuffix("Fields") for target in targets)
    raise InvalidRequest(f"Cannot find suitable handler for request. Expected one of: {list(known)}")


@dataclass(frozen=True, slots=True)
class _Target:
    """A function that may answer a body of /invocations, which must have all fields of one of these groups."""

    fields: type[BaseModel]
    answer: Callable[[Call, Any], Awaitable[Response]]
    groups: tuple[tuple[str, ...], ...]

    def fits(self, body: JsonObject) -> bool:
        return any(all(name in body for name in group) for group in self.groups)


_PROMPTS = (("input",), ("messages",))


def _targets(engine: PoolingEngine, task: object) -> list[_Target]:
    """The targets in vLLM's order; a body with another task than the model's own is for /pooling."""
    own: str | None = None
    if "embed" in engine.facts.tasks:
        own, of_texts = "embed", _Target(openai.EmbeddingFields, openai.embeddings, _PROMPTS)
    elif "classify" in engine.facts.tasks:
        own, of_texts = "classify", _Target(classify.ClassifyFields, classify.classify, _PROMPTS)
    else:
        of_texts = _Target(pooling.PoolingFields, pooling.pooling, _PROMPTS)
    of_tasks = (("tasks",),) if task in (None, own) else (("task",), ("tasks",))
    return [
        _Target(pooling.PoolingFields, pooling.pooling, of_tasks),
        of_texts,
        _Target(score.RerankFields, score.rerank, (("query", "documents"),)),
        _Target(score.ScoreFields, score.score_pairs, score.PAIR_NAMES),
        _Target(pooling.PoolingFields, pooling.pooling, (("data",),)),
    ]


async def rerank(call: Call, body: JsonObject) -> Response:
    """Documents by how well they answer a query, best first."""
    return await _rerank(call, body, 1, of_weaviate=True)


async def rerank_v1(call: Call, body: JsonObject) -> Response:
    """As /rerank, for all clients but Weaviate's."""
    return await _rerank(call, body, 1)


async def rerank_v2(call: Call, body: JsonObject) -> Response:
    """Documents by how well they answer a query, best first, with the `meta` of Cohere's version 2."""
    return await _rerank(call, body, 2)


async def _rerank(call: Call, body: JsonObject, version: int, of_weaviate: bool = False) -> Response:
    """The answer in the dialect of the body.

    version: of Cohere's API, by the path. of_weaviate: whether Weaviate's clients use the path.
    """
    names = body.keys()
    if "texts" in names:
        call.speak(tei.shape)
        return await tei.rerank(call, call.parse(body, tei.RerankFields))
    if voyage.OWN_RERANK_FIELDS & names:
        call.speak(voyage.shape)
        return await voyage.rerank(call, call.parse(body, voyage.RerankFields))
    if cohere.OWN_RERANK_FIELDS & names:
        call.speak(cohere.shape)
        return await cohere.answer_rerank(call, call.parse(body, cohere.RerankFields), version)
    if of_weaviate and "property" in names:
        call.speak(weaviate.shape)
        return await weaviate.rerank(call, call.parse(body, weaviate.RerankFields))
    fields = call.parse(body, score.RerankFields)

    def more(scored: Scored) -> Mapping[str, object]:
        """Further fields of vLLM's reply, for clients of other APIs whose body looks the same."""
        if version > 1:
            return {"meta": cohere.rerank_meta(version, scored)}
        if of_weaviate and names == weaviate.RERANK_FIELDS:
            pairs = fields.pairs()
            texts = [item for item in (*pairs.queries, *pairs.documents) if isinstance(item, str)]
            if len(texts) == 1 + len(pairs.documents):
                return weaviate.in_order(texts[0], texts[1:], scored)
        return {}

    return await score.rerank(call, fields, more)


class SharedRerankReply(score.RerankReply):
    """vLLM's reply at a shared path, best first; that of /v2/rerank has Cohere's `meta`.

    To `query` and `documents` alone it has `scores` too, as Weaviate reads them: in the order of the documents.
    """

    meta: NotRequired[cohere.Meta]
    query: NotRequired[str]
    scores: NotRequired[list[weaviate.DocumentScore]]


_RERANK_BODIES = (score.RerankFields, tei.RerankFields, voyage.RerankFields, cohere.RerankFields)
_RERANK_REPLIES = (SharedRerankReply, tei.RerankReply, voyage.RerankReply, cohere.RerankReply)
_RERANK_ERRORS = (Errors(), tei.ERRORS, *voyage.ERRORS, *cohere.ERRORS)
INVOCATIONS = Dialect(
    "sagemaker",
    (
        Route(
            "POST",
            "/invocations",
            invocations,
            (
                *(openai.EmbeddingFields, pooling.PoolingFields, classify.ClassifyFields),
                *(score.RerankFields, score.ScoreFields),
                *(tei.EmbedFields, tei.PredictFields, tei.SimilarityFields, tei.RerankFields, tei.TokenFields),
            ),
            (
                *(openai.EmbeddingReply, pooling.PoolingReply, pooling.PluginReply, classify.ClassifyReply),
                *(score.ScoreReply, score.RerankReply),
                *(tei.EmbedReply, tei.PredictReply, tei.SimilarityReply, tei.RerankReply, tei.EmbedSparseReply),
            ),
            errors=(Errors(), tei.ERRORS),
            media=openai.BYTES,
            headers=openai.METADATA,
        ),
    ),
)
RERANK = Dialect(
    "scores",
    (
        Route(
            "POST",
            "/rerank",
            rerank,
            (*_RERANK_BODIES, weaviate.RerankFields),
            (*_RERANK_REPLIES, weaviate.PropertyReply),
            errors=(*_RERANK_ERRORS, Errors(weaviate.Error)),
        ),
        Route("POST", "/v1/rerank", rerank_v1, _RERANK_BODIES, hidden=True),
        Route("POST", "/v2/rerank", rerank_v2, _RERANK_BODIES, _RERANK_REPLIES, errors=_RERANK_ERRORS),
    ),
)
