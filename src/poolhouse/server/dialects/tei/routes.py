"""TEI's routes, and the answer of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import Prompt
from poolhouse.outputs import SparseVector
from poolhouse.plans import scoring, sparse
from poolhouse.server.dialects import _replies, health, openai
from poolhouse.server.dialects._fields import body_schema
from poolhouse.server.dialects._pairs import Sides, score
from poolhouse.server.dialects.tei.errors import EmptyInput, openai_shape, shape
from poolhouse.server.dialects.tei.fields import (
    EmbedFields,
    OpenAIFields,
    PredictFields,
    RerankFields,
    SimilarityFields,
    TeiFields,
    TokenFields,
)
from poolhouse.server.dialects.tei.info import characters, headers, info, is_splade
from poolhouse.server.dialects.tei.tokens import DecodeFields, TokenizeFields, answer_decode, answer_tokenize
from poolhouse.server.dialects.vllm.classify import label_names, ranked_labels
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.body import read_json, without_nulls
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import speak
from poolhouse.tasks import Task


def router(serving: Serving) -> APIRouter:
    """Routes at TEI's own paths, without those that other dialects share."""
    routes = direct_router("text-embeddings-inference")
    _add(routes, serving)
    return routes


def prefixed_router(serving: Serving) -> APIRouter:
    """All of TEI under /tei, those too whose paths other dialects share."""
    routes = direct_router("text-embeddings-inference", "/tei")
    _add(routes, serving)

    @routes.get("", include_in_schema=False)
    @routes.get("/health", include_in_schema=False)
    @routes.get("/ping", include_in_schema=False)
    async def alive(_: Request) -> Response:
        """200 while every engine can answer, else 503."""
        return health.answer(serving)

    @routes.post("", include_in_schema=False)
    async def bare(http: Request) -> Response:
        """As `/`, for clients that leave the last slash away."""
        speak(http, shape)
        return await by_model(serving, http, await read_json(http, serving.settings))

    @routes.post("/rerank", openapi_extra=body_schema(RerankFields))
    async def rerank(http: Request) -> Response:
        """Texts by how well they answer a query, best first."""
        speak(http, shape)
        return await answer_rerank(serving, http, await serving.read(http, RerankFields))

    @routes.post("/v1/embeddings", openapi_extra=body_schema(OpenAIFields))
    @routes.post("/embeddings", include_in_schema=False)
    async def embeddings(http: Request) -> Response:
        """OpenAI's embeddings with TEI's errors and headers."""
        speak(http, openai_shape)
        started = time.perf_counter()
        fields = await serving.read(http, OpenAIFields)
        fields.refuse_nothing()
        if fields.model not in serving.engines and serving.only:
            # TEI serves one model, by whatever name it is called.
            fields.model = None
        response = await openai.answer(serving, http, fields)
        engine = serving.engine(fields.model)
        response.headers.update(headers(engine, http.state.answers, characters(fields.prompts(serving)), started))
        return response

    @routes.post("/tokenize", openapi_extra=body_schema(TokenizeFields))
    async def tokenize(http: Request) -> Response:
        """The tokens of each text, with the characters that each stands for."""
        speak(http, shape)
        return await answer_tokenize(serving, http, await serving.read(http, TokenizeFields))

    return routes


def _add(routes: APIRouter, serving: Serving) -> None:
    @routes.get("/", include_in_schema=False)
    async def alive(_: Request) -> Response:
        """As /health, where load balancers ask by default."""
        return health.answer(serving)

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
        answers, took = await _run(serving, http, fields, "token_embed", use_activation=False)
        arrays = [np.ascontiguousarray(answer.array) for answer in answers]
        return await _replies.write(serving, lambda: dumps(arrays), answers, took)

    @routes.post("/embed_sparse", openapi_extra=body_schema(TokenFields))
    async def embed_sparse(http: Request) -> Response:
        """The entries of each input's sparse vector, by rising index."""
        speak(http, shape)
        return await answer_embed_sparse(serving, http, await serving.read(http, TokenFields))

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

    @routes.post("/decode", openapi_extra=body_schema(DecodeFields))
    async def decode(http: Request) -> Response:
        """The text of each list of ids."""
        speak(http, shape)
        return await answer_decode(serving, http, await serving.read(http, DecodeFields))

    @routes.get("/info")
    async def about(http: Request) -> Response:
        """The model and the server's limits."""
        speak(http, shape)
        engine = serving.engine(http.query_params.get("model"))
        return Response(dumps(info(serving, engine)), media_type="application/json")

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
        parts = [(await by_model(serving, http, without_nulls(instance))).body for instance in instances]
        return Response(b'{"predictions":[%s]}' % b",".join(map(bytes, parts)), media_type="application/json")


async def by_model(serving: Serving, http: Request, body: dict[str, Any]) -> Response:
    """The answer to a body by its form and by what the model is for."""
    if "query" in body:
        return await answer_rerank(serving, http, serving.parse(body, RerankFields))
    if isinstance(body.get("inputs"), dict):
        return await answer_similarity(serving, http, serving.parse(body, SimilarityFields))
    model = body.get("model")
    engine = serving.engine(model if isinstance(model, str) else None)
    if "classify" in engine.facts.tasks:
        return await answer_predict(serving, http, serving.parse(body, PredictFields))
    if is_splade(engine):
        return await answer_embed_sparse(serving, http, serving.parse(body, TokenFields))
    return await answer_embed(serving, http, serving.parse(body, EmbedFields))


async def answer_embed(serving: Serving, http: Request, fields: EmbedFields) -> Response:
    serving.check_list(fields.inputs, "inputs")
    splade = is_splade(serving.engine(fields.model))
    if splade and fields.normalize:
        raise UnsupportedTask("`normalize` is not available for SPLADE models", "normalize")
    answers, took = await _run(
        serving,
        http,
        fields,
        "embed",
        use_activation=not splade and fields.normalize is not False,
        dimensions=fields.dimensions,
    )
    return await _replies.write(serving, lambda: dumps(np.stack([a.array for a in answers])), answers, took)


async def answer_embed_sparse(serving: Serving, http: Request, fields: TokenFields) -> Response:
    started = time.perf_counter()
    engine = serving.engine(fields.model)
    serving.check_list(fields.inputs, "inputs")
    prompts = fields.prompts()
    serving.check_items(len(prompts), "inputs")
    plan = sparse.plan(engine, prompts, sparse.Options(fields.params(), fields.prompt_name))
    answers = await serving.answers(http, engine, plan.requests, "inputs[{}]".format)
    took = headers(engine, answers, characters(prompts), started)
    return await _replies.write(
        serving, lambda: dumps([_entries(made.vector) for made in plan.finish(answers)]), answers, took
    )


async def answer_predict(serving: Serving, http: Request, fields: PredictFields) -> Response:
    serving.check_list(fields.inputs, "inputs")
    texts, single = fields.texts()
    prompts = [Prompt(text, pair=pair) for text, pair in texts]
    answers, took = await _run(serving, http, fields, "classify", prompts=prompts, use_activation=not fields.raw_scores)
    names = label_names(serving.engine(fields.model))
    lists = [ranked_labels(answer, names) for answer in answers]
    return await _replies.write(serving, lambda: dumps(lists[0] if single else lists), answers, took)


async def answer_similarity(serving: Serving, http: Request, fields: SimilarityFields) -> Response:
    inputs, parameters = fields.inputs, fields.parameters
    if not inputs.sentences or "" in (inputs.source_sentence, *inputs.sentences):
        raise EmptyInput("inputs")
    prompts = [Prompt(inputs.source_sentence), *map(Prompt, inputs.sentences)]
    parameters.model = fields.model
    answers, took = await _run(serving, http, parameters, "embed", prompts=prompts, use_activation=True)

    def render() -> bytes:
        vectors = np.stack([answer.array for answer in answers])
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return dumps(vectors[1:] @ vectors[0])

    return await _replies.write(serving, render, answers, took)


async def answer_rerank(serving: Serving, http: Request, fields: RerankFields) -> Response:
    started = time.perf_counter()
    engine = serving.engine(fields.model)
    if not fields.texts or (not fields.query and "" in fields.texts):
        raise EmptyInput("texts")
    asked = scoring.Asked(replace(fields.params(), use_activation=not fields.raw_scores))
    if "classify" not in engine.facts.tasks:
        asked = scoring.Asked(fields.params())  # cosines and MaxSim have no activation
    scored = await score(serving, http, engine, Sides([fields.query], fields.texts, ("query", "texts")), asked)
    ranks: list[dict[str, Any]] = [
        {"index": place, "score": scored.scores[place].score}
        | ({"text": fields.texts[place]} if fields.return_text else {})
        for place in scored.ranked()
    ]
    # Each text is read beside the query, so TEI counts that as often.
    read = len(fields.query) * len(fields.texts) + sum(map(len, fields.texts))
    took = headers(engine, scored.answers, read, started)
    return await _replies.write(serving, lambda: dumps(ranks), scored.answers, took)


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
    if task not in engine.facts.tasks:
        raise UnsupportedTask(
            f"The model `{engine.facts.name}` does not have this route; its tasks: {list(engine.facts.tasks)}.", "model"
        )
    prompts = fields.prompts() if prompts is None else prompts
    serving.check_items(len(prompts), "inputs")
    params = replace(fields.params(), use_activation=use_activation, dimensions=dimensions)
    requests = [EngineRequest(prompt, task, params, fields.prompt_name) for prompt in prompts]
    answers = await serving.answers(http, engine, requests, "inputs[{}]".format)
    return answers, headers(engine, answers, characters(prompts), started)


def _entries(vector: SparseVector) -> list[dict[str, Any]]:
    # The weights stay numpy's, which are written as short as float32 allows.
    return [{"index": index, "value": weight} for index, weight in zip(vector.indices, vector.weights, strict=True)]
