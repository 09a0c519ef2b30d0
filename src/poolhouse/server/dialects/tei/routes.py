"""Routes of TEI: what each answers, at its own path and under /tei."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NotRequired

import numpy as np
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import Prompt
from poolhouse.outputs import SparseVector
from poolhouse.plans import scoring, sparse
from poolhouse.server.call import Call, JsonObject, as_json
from poolhouse.server.dialects import health, openai
from poolhouse.server.dialects._pairs import Pairs, score
from poolhouse.server.dialects.openai import BYTES, METADATA, EmbeddingReply
from poolhouse.server.dialects.tei.errors import ERRORS, OPENAI_ERRORS, EmptyInput, Error, openai_shape, shape
from poolhouse.server.dialects.tei.fields import (
    DecodeFields,
    EmbedFields,
    OpenAIFields,
    PredictFields,
    RerankFields,
    SimilarityFields,
    TeiFields,
    TokenFields,
    TokenizeFields,
)
from poolhouse.server.dialects.tei.info import COST, Info, characters, headers, info, is_splade
from poolhouse.server.dialects.tei.tokens import DecodeReply, TokenizeReply, decode, tokenize
from poolhouse.server.dialects.vllm.classify import label_names, ranked_labels
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.body import without_nulls
from poolhouse.server.wire.contract import Errors, Matrix, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.tasks import Task


async def alive(call: Call) -> Response:
    """200 while every engine can answer, else 503; load balancers ask at / by default."""
    return health.answer(call.engines)


async def by_model(call: Call, body: JsonObject) -> Response:
    """The answer to a body by its form and by what the model is for."""
    if "query" in body:
        return await rerank(call, call.parse(body, RerankFields))
    if isinstance(body.get("inputs"), dict):
        return await similarity(call, call.parse(body, SimilarityFields))
    model = body.get("model")
    engine = await call.use(model if isinstance(model, str) else None)
    if "classify" in engine.facts.tasks:
        return await predict(call, call.parse(body, PredictFields))
    if is_splade(engine):
        return await embed_sparse(call, call.parse(body, TokenFields))
    return await embed(call, call.parse(body, EmbedFields))


async def vertex(call: Call, body: JsonObject) -> Response:
    """Several bodies in one."""
    instances = body.get("instances")
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise InvalidRequest("instances must be a list of bodies.", "instances")
    call.engines.check_items(len(instances), "instances")
    parts = [(await by_model(call, without_nulls(instance))).body for instance in instances]
    return Response(b'{"predictions":[%s]}' % b",".join(map(bytes, parts)), media_type="application/json")


async def about(call: Call) -> Response:
    """The model and the server's limits."""
    engine = await call.use(call.http.query_params.get("model"))
    return as_json(info(engine, call.settings))


async def embed(call: Call, fields: EmbedFields) -> Response:
    """One vector per input, as a bare list."""
    call.engines.check_list(fields.inputs, "inputs")
    splade = is_splade(await call.use(fields.model))
    if splade and fields.normalize:
        raise UnsupportedTask("`normalize` is not available for SPLADE models", "normalize")
    answers, took = await _run(
        call,
        fields,
        "embed",
        use_activation=not splade and fields.normalize is not False,
        dimensions=fields.dimensions,
    )
    return await call.write(lambda: dumps(np.stack([a.array for a in answers])), answers, took)


async def embed_all(call: Call, fields: TokenFields) -> Response:
    """One vector per token, special tokens included, not normalised."""
    call.engines.check_list(fields.inputs, "inputs")
    answers, took = await _run(call, fields, "token_embed", use_activation=False)
    return await call.write(lambda: dumps([np.ascontiguousarray(one.array) for one in answers]), answers, took)


async def embed_sparse(call: Call, fields: TokenFields) -> Response:
    """The entries of each input's sparse vector, by rising index."""
    engine = await call.use(fields.model)
    call.engines.check_list(fields.inputs, "inputs")
    prompts = fields.prompts()
    call.engines.check_items(len(prompts), "inputs")
    plan = sparse.plan(engine, prompts, sparse.SparseOptions(fields.params(), fields.prompt_name))
    answers = await call.answers(plan.requests, "inputs[{}]".format)
    took = headers(engine, answers, characters(prompts), call.started)
    return await call.write(lambda: dumps([_entries(one.vector) for one in plan.finish(answers)]), answers, took)


async def predict(call: Call, fields: PredictFields) -> Response:
    """The labels of texts, or of pairs, likeliest first."""
    call.engines.check_list(fields.inputs, "inputs")
    texts, single = fields.texts()
    prompts = [Prompt(text, pair=pair) for text, pair in texts]
    answers, took = await _run(call, fields, "classify", prompts=prompts, use_activation=not fields.raw_scores)
    names = label_names(await call.use(fields.model))
    lists = [ranked_labels(answer, names) for answer in answers]
    return await call.write(lambda: dumps(lists[0] if single else lists), answers, took)


async def similarity(call: Call, fields: SimilarityFields) -> Response:
    """The cosine of one sentence with each of many."""
    inputs, parameters = fields.inputs, fields.parameters
    call.engines.check_items(len(inputs.sentences) + 1, "inputs")
    if not inputs.sentences or "" in (inputs.source_sentence, *inputs.sentences):
        raise EmptyInput("inputs")
    prompts = [Prompt(inputs.source_sentence), *map(Prompt, inputs.sentences)]
    parameters.model = fields.model
    answers, took = await _run(call, parameters, "embed", prompts=prompts, use_activation=True)

    def render() -> bytes:
        vectors = np.stack([answer.array for answer in answers])
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return dumps(vectors[1:] @ vectors[0])

    return await call.write(render, answers, took)


async def rerank(call: Call, fields: RerankFields) -> Response:
    """Texts by how well they answer a query, best first."""
    engine = await call.use(fields.model)
    if not fields.texts or (not fields.query and "" in fields.texts):
        raise EmptyInput("texts")
    params = fields.params()
    if "classify" in engine.facts.tasks:  # cosines and MaxSim have no activation
        params = replace(params, use_activation=not fields.raw_scores)
    scored = await score(call, Pairs([fields.query], fields.texts, ("query", "texts")), scoring.ScoreOptions(params))
    ranks: list[dict[str, object]] = [
        {"index": index, "score": scored.scores[index].score}
        | ({"text": fields.texts[index]} if fields.return_text else {})
        for index in scored.ranked()
    ]
    # Each text is read beside the query, so TEI counts that as often.
    read = len(fields.query) * len(fields.texts) + sum(map(len, fields.texts))
    took = headers(engine, scored.answers, read, call.started)
    return await call.write(lambda: dumps(ranks), scored.answers, took)


async def embeddings(call: Call, fields: OpenAIFields) -> Response:
    """OpenAI's embeddings with TEI's errors and headers."""
    fields.refuse_nothing()
    # TEI serves one model, by whatever name it is called.
    fields.model = (await call.use(fields.model, any_name=True)).facts.name
    response = await openai.embeddings(call, fields)
    read = characters(fields.prompts(call.engines))
    response.headers.update(headers(call.engine, call.answered, read, call.started))
    return response


async def _run(
    call: Call,
    fields: TeiFields,
    task: Task,
    *,
    prompts: Sequence[Prompt] | None = None,
    use_activation: bool | None = None,
    dimensions: int | None = None,
) -> tuple[list[Answer], dict[str, str]]:
    """Answers of one task, and the headers with its cost."""
    engine = await call.use(fields.model)
    if task not in engine.facts.tasks:
        raise UnsupportedTask(
            f"The model `{engine.facts.name}` does not have this route; its tasks: {list(engine.facts.tasks)}.", "model"
        )
    prompts = fields.prompts() if prompts is None else prompts
    call.engines.check_items(len(prompts), "inputs")
    params = replace(fields.params(), use_activation=use_activation, dimensions=dimensions)
    requests = [EngineRequest(prompt, task, params, fields.prompt_name) for prompt in prompts]
    answers = await call.answers(requests, "inputs[{}]".format)
    return answers, headers(engine, answers, characters(prompts), call.started)


def _entries(vector: SparseVector) -> list[dict[str, object]]:
    # The weights stay numpy's, which are written as short as float32 allows.
    return [{"index": index, "value": weight} for index, weight in zip(vector.indices, vector.weights, strict=True)]


class Prediction(TypedDict):
    """A label and its score."""

    score: float
    label: str


class Rank(TypedDict):
    """A text's index and score."""

    index: int
    score: float
    text: NotRequired[str]


class Entry(TypedDict):
    """An entry of a sparse vector."""

    index: int
    value: float


EmbedReply = Matrix
EmbedSparseReply = list[list[Entry]]
EmbedAllReply = list[Matrix]
PredictReply = list[Prediction] | list[list[Prediction]]
SimilarityReply = Vector
RerankReply = list[Rank]

_TAG = "text-embeddings-inference"
_ANY = (EmbedFields, PredictFields, SimilarityFields, RerankFields, TokenFields)
_INFO_QUERY = {"model": "A served model; none takes the first."}
_ROUTES = (
    Route("GET", "/", alive, hidden=True),
    Route("POST", "/embed", embed, EmbedFields, (EmbedReply,), headers=COST),
    Route("POST", "/embed_all", embed_all, TokenFields, (EmbedAllReply,), headers=COST),
    Route("POST", "/embed_sparse", embed_sparse, TokenFields, (EmbedSparseReply,), headers=COST),
    Route("POST", "/predict", predict, PredictFields, (PredictReply,), headers=COST),
    Route("POST", "/similarity", similarity, SimilarityFields, (SimilarityReply,), headers=COST),
    Route("POST", "/decode", decode, DecodeFields, (DecodeReply,)),
    Route("GET", "/info", about, replies=(Info,), errors=(Errors(Error, (404,)),), query=_INFO_QUERY),
    Route("POST", "/", by_model, _ANY, hidden=True),
    Route("POST", "/vertex", vertex, _ANY, hidden=True),
)
# Under /tei there are also the paths that other dialects share without the prefix.
_PREFIXED = (
    Route("GET", "", alive, others=("/health", "/ping"), hidden=True),
    Route("POST", "", by_model, _ANY, hidden=True),
    Route("POST", "/rerank", rerank, RerankFields, (RerankReply,), headers=COST),
    Route("POST", "/tokenize", tokenize, TokenizeFields, (TokenizeReply,)),
)
_EMBEDDINGS = Route(
    "POST",
    "/v1/embeddings",
    embeddings,
    OpenAIFields,
    (EmbeddingReply,),
    media=BYTES,
    headers={**METADATA, **COST},
    others=("/embeddings",),
)
OWN = Dialect(_TAG, _ROUTES, shape, (ERRORS,))
PREFIXED = (
    Dialect(_TAG, (*_ROUTES, *_PREFIXED), shape, (ERRORS,), prefix="/tei", owns=("/tei",)),
    Dialect(_TAG, (_EMBEDDINGS,), openai_shape, (OPENAI_ERRORS,), prefix="/tei"),
)
