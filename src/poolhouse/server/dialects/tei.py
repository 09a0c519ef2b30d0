"""Hugging Face's Text Embeddings Inference: its routes at their own paths, and all of them under /tei.

Source: text-embeddings-inference 1.9. Where ours can do more (pairs scored by any model), it does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from poolhouse import scoring
from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import EngineClosed, EngineError, InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import Prompt
from poolhouse.server import replies
from poolhouse.server.body import read_json
from poolhouse.server.dialects import openai
from poolhouse.server.dialects.fields import body_schema
from poolhouse.server.dialects.pairs import Sides, score
from poolhouse.server.dialects.routing import direct_router
from poolhouse.server.dialects.tei_fields import (
    EmbedFields,
    EmptyInput,
    PredictFields,
    RerankFields,
    SimilarityFields,
    TeiFields,
    TokenFields,
)
from poolhouse.server.encoding import dumps
from poolhouse.server.errors import Failure, Refused, as_json, speak
from poolhouse.server.serving import Engine, Serving
from poolhouse.tasks import Task


def router(serving: Serving) -> APIRouter:
    """Routes at TEI's own paths, without those that other dialects share."""
    routes = direct_router("text-embeddings-inference")
    _add(routes, serving)

    @routes.post("/", include_in_schema=False)
    async def root(http: Request) -> Response:
        """The route that fits the model, as clients that know one address only expect it."""
        speak(http, shape)
        return await by_model(serving, http, await read_json(http, serving.settings))

    @routes.post("/vertex", include_in_schema=False)
    async def vertex(http: Request) -> Response:
        """Several bodies in one."""
        speak(http, shape)
        body = await read_json(http, serving.settings)
        instances = body.get("instances")
        if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
            raise InvalidRequest("instances must be a list of bodies.", "instances")
        serving.check_items(len(instances), "instances")
        parts = [(await by_model(serving, http, instance)).body for instance in instances]
        return Response(b'{"predictions":[%s]}' % b",".join(map(bytes, parts)), media_type="application/json")

    return routes


def prefixed_router(serving: Serving) -> APIRouter:
    """All of TEI under /tei, those too whose paths other dialects share."""
    routes = direct_router("text-embeddings-inference", "/tei")
    _add(routes, serving)

    @routes.post("/rerank", openapi_extra=body_schema(RerankFields))
    async def rerank(http: Request) -> Response:
        """Texts by how well they answer a query, best first."""
        speak(http, shape)
        return await answer_rerank(serving, http, await serving.read(http, RerankFields))

    @routes.post("/v1/embeddings", openapi_extra=body_schema(openai.EmbeddingFields))
    @routes.post("/embeddings", include_in_schema=False)
    async def embeddings(http: Request) -> Response:
        """OpenAI's embeddings with TEI's errors."""
        speak(http, _openai_shape)
        return await openai.answer(serving, http, await serving.read(http, openai.EmbeddingFields))

    return routes


def _add(routes: APIRouter, serving: Serving) -> None:
    @routes.post("/embed", openapi_extra=body_schema(EmbedFields))
    async def embed(http: Request) -> Response:
        """One vector per input, as a bare list."""
        speak(http, shape)
        return await answer_embed(serving, http, await serving.read(http, EmbedFields))

    @routes.post("/embed_all", openapi_extra=body_schema(TokenFields))
    async def embed_all(http: Request) -> Response:
        """One vector per token, special tokens included, not normalised."""
        speak(http, shape)
        fields = await serving.read(http, TokenFields)
        serving.check_list(fields.inputs, "inputs")
        answers, headers = await _run(serving, http, fields, "token_embed", use_activation=False)
        arrays = [np.ascontiguousarray(answer.array) for answer in answers]
        return await replies.write(serving, lambda: dumps(arrays), answers, headers)

    @routes.post("/predict", openapi_extra=body_schema(PredictFields))
    async def predict(http: Request) -> Response:
        """The labels of texts, or of pairs, likeliest first."""
        speak(http, shape)
        return await answer_predict(serving, http, await serving.read(http, PredictFields))

    @routes.post("/similarity", openapi_extra=body_schema(SimilarityFields))
    async def similarity(http: Request) -> Response:
        """The cosine of one sentence with each of many."""
        speak(http, shape)
        return await answer_similarity(serving, http, await serving.read(http, SimilarityFields))

    @routes.get("/info")
    async def info(http: Request) -> Response:
        """The model and the server's limits."""
        speak(http, shape)
        engine = serving.engine(http.query_params.get("model"))
        return Response(dumps(_info(serving, engine)), media_type="application/json")


async def by_model(serving: Serving, http: Request, body: dict[str, Any]) -> Response:
    """The answer to a body by its form and by what the model is for."""
    if "query" in body:
        return await answer_rerank(serving, http, serving.parse(body, RerankFields))
    if isinstance(body.get("inputs"), dict):
        return await answer_similarity(serving, http, serving.parse(body, SimilarityFields))
    model = body.get("model")
    engine = serving.engine(model if isinstance(model, str) else None)
    if "classify" in engine.tasks:
        return await answer_predict(serving, http, serving.parse(body, PredictFields))
    return await answer_embed(serving, http, serving.parse(body, EmbedFields))


async def answer_embed(serving: Serving, http: Request, fields: EmbedFields) -> Response:
    serving.check_list(fields.inputs, "inputs")
    answers, headers = await _run(
        serving, http, fields, "embed", use_activation=fields.normalize, dimensions=fields.dimensions
    )
    return await replies.write(serving, lambda: dumps(np.stack([a.array for a in answers])), answers, headers)


async def answer_predict(serving: Serving, http: Request, fields: PredictFields) -> Response:
    serving.check_list(fields.inputs, "inputs")
    texts, single = fields.texts()
    prompts = [Prompt(text, pair=pair) for text, pair in texts]
    answers, headers = await _run(
        serving, http, fields, "classify", prompts=prompts, use_activation=not fields.raw_scores
    )
    names = serving.engine(fields.model).label_names
    lists = [_predictions(answer, names) for answer in answers]
    return await replies.write(serving, lambda: dumps(lists[0] if single else lists), answers, headers)


async def answer_similarity(serving: Serving, http: Request, fields: SimilarityFields) -> Response:
    inputs, parameters = fields.inputs, fields.parameters
    if not inputs.sentences:
        raise EmptyInput("sentences")
    prompts = [Prompt(inputs.source_sentence), *map(Prompt, inputs.sentences)]
    parameters.model = fields.model
    answers, headers = await _run(serving, http, parameters, "embed", prompts=prompts, use_activation=True)

    def render() -> bytes:
        vectors = np.stack([answer.array for answer in answers])
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return dumps(vectors[1:] @ vectors[0])

    return await replies.write(serving, render, answers, headers)


async def answer_rerank(serving: Serving, http: Request, fields: RerankFields) -> Response:
    started = time.perf_counter()
    engine = serving.engine(fields.model)
    if not fields.texts:
        raise EmptyInput("texts")
    asked = scoring.Asked(replace(fields.params(), use_activation=not fields.raw_scores))
    if "classify" not in engine.tasks:
        asked = scoring.Asked(fields.params())  # cosines and MaxSim have no activation
    scored = await score(serving, http, engine, Sides([fields.query], fields.texts, ("query", "texts")), asked)
    ranks: list[dict[str, Any]] = [
        {"index": place, "score": scored.scores[place].score}
        | ({"text": fields.texts[place]} if fields.return_text else {})
        for place in scored.ranked()
    ]
    characters = len(fields.query) + sum(map(len, fields.texts))
    headers = _headers(engine, scored.answers, characters, started)
    return await replies.write(serving, lambda: dumps(ranks), scored.answers, headers)


async def _run(
    serving: Serving,
    http: Request,
    fields: TeiFields,
    task: Task,
    *,
    prompts: Sequence[Prompt] | None = None,
    use_activation: bool | None = None,
    dimensions: int | None = None,
) -> tuple[list[Answer], dict[str, str]]:
    """Answers of one task, and the headers that tell of the work."""
    started = time.perf_counter()
    engine = serving.engine(fields.model)
    if task not in engine.tasks:
        raise UnsupportedTask(
            f"The model `{engine.name}` does not have this route; its tasks: {list(engine.tasks)}.", "model"
        )
    prompts = fields.prompts() if prompts is None else prompts
    serving.check_items(len(prompts), "inputs")
    params = replace(fields.params(), use_activation=use_activation, dimensions=dimensions)
    requests = [EngineRequest(prompt, task, params, fields.prompt_name) for prompt in prompts]
    answers = await serving.answers(http, engine, requests, "inputs[{}]".format)
    characters = sum(len(prompt.text or "") + len(prompt.pair or "") for prompt in prompts)
    return answers, _headers(engine, answers, characters, started)


def _headers(engine: Engine, answers: Sequence[Answer], characters: int, started: float) -> dict[str, str]:
    tokens = sum(len(answer.tokens) for answer in answers)
    return {
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(tokens),
        "x-total-time": str(round(1000 * (time.perf_counter() - started))),
    }


def _predictions(answer: Answer, names: Any) -> list[dict[str, Any]]:
    order = np.argsort(-answer.array, kind="stable")
    return [{"score": float(answer.array[place]), "label": names.get(int(place), f"LABEL_{place}")} for place in order]


def _info(serving: Serving, engine: Engine) -> dict[str, Any]:
    import poolhouse

    names = {str(place): name for place, name in engine.label_names.items()}
    labels = {"id2label": names, "label2id": {name: int(place) for place, name in names.items()}}
    kind: dict[str, Any] = {"embedding": {"pooling": "unknown"}}
    if "classify" in engine.tasks:
        kind = {"reranker" if engine.labels == 1 else "classifier": labels}
    settings = serving.settings
    return {
        "model_id": engine.name,
        "model_sha": None,
        "model_dtype": "unknown",
        "served_model_name": engine.name,
        "model_type": kind,
        "max_concurrent_requests": settings.max_queued_prompts,
        "max_input_length": engine.max_tokens,
        "max_batch_tokens": None,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_client_batch_size,
        "auto_truncate": True,
        "tokenization_workers": None,
        "version": poolhouse.__version__,
        "sha": None,
        "docker_label": None,
        "tasks": list(engine.tasks),
        "max_body_bytes": settings.max_body_bytes,
        "request_timeout_seconds": settings.request_timeout_seconds,
    }


def shape(failure: Failure) -> Response:
    """TEI's error body."""
    status, kind = _kind(failure)
    return as_json(replace(failure, status=status), {"error": failure.message, "error_type": kind})


def _openai_shape(failure: Failure) -> Response:
    status, kind = _kind(failure)
    return as_json(replace(failure, status=status), {"message": failure.message, "code": status, "type": kind})


def _kind(failure: Failure) -> tuple[int, str]:
    """TEI's status and word for it."""
    match failure.error:
        case EmptyInput():
            return 400, "Empty"
        case Refused() if failure.status == 429:
            return 429, "Overloaded"
        case Refused():
            return failure.status, "Validation"
        case UnsupportedTask():
            return 424, "Backend"
        case InvalidRequest():
            return 404 if failure.status == 404 else 422, "Validation"
        case EngineClosed():
            return 503, "Unhealthy"
        case EngineError():
            return 424, "Backend"
    return (422, "Validation") if failure.status == 400 else (failure.status, "Backend")
