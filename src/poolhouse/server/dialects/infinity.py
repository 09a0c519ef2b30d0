"""Infinity's routes under /infinity; `usage` counts tokens, where Infinity counts characters.

Source: infinity 0.0.77.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import Prompt
from poolhouse.params import PoolingParams
from poolhouse.server.dialects import _hosted, _replies, health
from poolhouse.server.dialects._fields import Many, body_schema
from poolhouse.server.dialects._hosted import Wish
from poolhouse.server.dialects.vllm.classify import label_names, ranked_labels
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.contract import Contract, Contracts, Cut, Errors, Matrix, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json, problems, speak

# Infinity strips what it reads.
_Text = Annotated[str, StringConstraints(strip_whitespace=True)]
_Texts = Annotated[Many[_Text], Field(min_length=1)]
# What Infinity calls a model that is not named.
_NO_MODEL = "default/not-specified"


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    model: str = _NO_MODEL

    @property
    def name(self) -> str | None:
        return None if self.model == _NO_MODEL else self.model


class EmbeddingFields(_Fields):
    """The body of POST /infinity/embeddings."""

    input: _Text | _Texts
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    dimensions: int = Field(
        0,
        ge=0,
        description="0 leaves vectors as they are.",
        validation_alias=AliasChoices("dimensions", "output_dimension"),  # LiteLLM writes the second
    )
    modality: Literal["text", "image", "audio"] = "text"


class RerankFields(_Fields):
    """The body of POST /infinity/rerank."""

    query: _Text
    documents: _Texts
    return_documents: bool = False
    raw_scores: bool = False
    top_n: int | None = Field(None, gt=0)


class ClassifyFields(_Fields):
    """The body of POST /infinity/classify."""

    input: _Texts
    raw_scores: bool = False


def prefixed_router(serving: Serving) -> APIRouter:
    """All of Infinity under /infinity."""
    routes = direct_router("infinity", "/infinity")

    @routes.get("/health")
    async def alive(_: Request) -> Response:
        """The time, while every engine can answer; else 503."""
        status = health.answer(serving).status_code
        return Response(dumps({"unix": time.time()}), status, media_type="application/json")

    @routes.get("/models")
    async def models(_: Request) -> Response:
        """The served models and what they can do."""
        data = [_model(serving, name, engine) for name, engine in serving.engines.items()]
        return Response(dumps({"data": data, "object": "list"}), media_type="application/json")

    @routes.post("/embeddings", openapi_extra=body_schema(EmbeddingFields))
    async def embeddings(http: Request) -> Response:
        """One vector per input, or one per token where the model has no other."""
        speak(http, shape)
        return await _embeddings(serving, http, await serving.read(http, EmbeddingFields))

    @routes.post("/rerank", openapi_extra=body_schema(RerankFields))
    async def rerank(http: Request) -> Response:
        """Documents by how well they answer a query, best first."""
        speak(http, shape)
        return await _rerank(serving, http, await serving.read(http, RerankFields))

    @routes.post("/classify", openapi_extra=body_schema(ClassifyFields))
    async def classify(http: Request) -> Response:
        """Every label of each input, likeliest first."""
        speak(http, shape)
        return await _classify(serving, http, await serving.read(http, ClassifyFields))

    return routes


async def _embeddings(serving: Serving, http: Request, fields: EmbeddingFields) -> Response:
    if fields.modality != "text":
        raise InvalidRequest(f"modality {fields.modality!r}: the models of this server read texts.", "modality")
    engine = serving.engine(fields.name)
    texts = [fields.input] if isinstance(fields.input, str) else fields.input
    wish = Wish(dimensions=fields.dimensions or None)
    task: Literal["embed", "token_embed"] = "embed" if "embed" in engine.facts.tasks else "token_embed"
    answers = await _hosted.embed(serving, http, engine, texts, wish, task=task)

    def render() -> bytes:
        vectors = _hosted.vectors(_hosted.arrays_of(answers), fields.encoding_format, engine, "encoding_format")
        data = [
            {"object": "embedding", "embedding": vector, "index": index} | _replies.cut(answer)
            for index, (vector, answer) in enumerate(zip(vectors, answers, strict=True))
        ]
        return dumps({"object": "list", "data": data, **_tail(http, engine, answers)})

    return await _replies.write(serving, render, answers)


async def _rerank(serving: Serving, http: Request, fields: RerankFields) -> Response:
    engine = serving.engine(fields.name)
    scored = await _hosted.rerank(
        serving, http, engine, fields.query, fields.documents, use_activation=not fields.raw_scores
    )
    results = [
        {
            "relevance_score": scored.scores[place].score,
            "index": place,
            "document": fields.documents[place] if fields.return_documents else None,
        }
        for place in scored.ranked(fields.top_n)
    ]
    body = {"object": "rerank", "results": results, **_tail(http, engine, scored.answers)}
    return await _replies.write(serving, lambda: dumps(body), scored.answers)


async def _classify(serving: Serving, http: Request, fields: ClassifyFields) -> Response:
    engine = serving.engine(fields.name)
    if "classify" not in engine.facts.tasks:
        raise UnsupportedTask(
            f"The model `{engine.facts.name}` has no labels; its tasks: {list(engine.facts.tasks)}.", "model"
        )
    serving.check_items(len(fields.input), "input")
    params = PoolingParams(use_activation=not fields.raw_scores, truncate_prompt_tokens=-1)
    answers = await serving.answers(
        http, engine, [EngineRequest(Prompt(text), "classify", params) for text in fields.input]
    )
    names = label_names(engine)
    data = [ranked_labels(answer, names) for answer in answers]
    body = {"object": "classify", "data": data, **_tail(http, engine, answers)}
    return await _replies.write(serving, lambda: dumps(body), answers)


def _tail(http: Request, engine: PoolingEngine, answers: list[Answer]) -> dict[str, Any]:
    tokens = _replies.tokens_of(answers)
    return {
        "model": engine.facts.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "id": _replies.reply_id("infinity", http, None),
        "created": int(time.time()),
    }


def _model(serving: Serving, name: str, engine: PoolingEngine) -> dict[str, Any]:
    capabilities: list[str] = [task for task in engine.facts.tasks if task in ("embed", "classify")]
    if engine.facts.labels in (0, 1):
        capabilities.append("rerank")
    waiting = serving.waiting(engine)
    return {
        "id": name,
        "stats": {
            "queue_fraction": waiting / serving.settings.max_queued_prompts,
            "queue_absolute": waiting,
            "results_pending": waiting,
            "batch_size": serving.settings.max_client_batch_size,
        },
        "object": "model",
        "owned_by": "infinity",
        "created": serving.started,
        "backend": "poolhouse",
        "capabilities": capabilities,
    }


def shape(failure: Failure) -> Response:
    """Infinity's error body: FastAPI's for wrong fields, OpenAI's for the rest, where an unknown model is a 400."""
    failure = _hosted.with_their_statuses(failure)
    if isinstance(failure.error, ValidationError):
        return as_json(failure, {"detail": problems(failure.error)})
    error = {"message": failure.message, "type": None, "param": failure.parameter, "code": failure.status}
    return as_json(failure, {"error": error})


class Problem(TypedDict):
    """What went wrong."""

    message: str
    type: None
    param: str | None
    code: int


class Error(TypedDict):
    """An error in Infinity's shape."""

    error: Problem


class WrongField(TypedDict):
    """A field of a body that is wrong, as FastAPI tells it."""

    type: str
    loc: list[str | int]
    msg: str


class WrongFields(TypedDict):
    """An error of a body whose fields are wrong."""

    detail: list[WrongField]


class Usage(TypedDict):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int


class Tail(TypedDict):
    """What all replies end with."""

    model: str
    usage: Usage
    id: str
    created: int


class Embedding(Cut):
    """The vector of an input, or those of its tokens; as numbers or in base64."""

    object: Literal["embedding"]
    embedding: Vector | Matrix | str
    index: int


class EmbeddingReply(Tail):
    """The reply of /infinity/embeddings."""

    object: Literal["list"]
    data: list[Embedding]


class Ranked(TypedDict):
    """A document's place and score."""

    relevance_score: float
    index: int
    document: str | None


class RerankReply(Tail):
    """The reply of /infinity/rerank, best first."""

    object: Literal["rerank"]
    results: list[Ranked]


class Label(TypedDict):
    """A label and its score."""

    score: float
    label: str


class ClassifyReply(Tail):
    """The reply of /infinity/classify: every label of each input, likeliest first."""

    object: Literal["classify"]
    data: list[list[Label]]


class Stats(TypedDict):
    """What waits for a model."""

    queue_fraction: float
    queue_absolute: int
    results_pending: int
    batch_size: int


class Model(TypedDict):
    """A served model."""

    id: str
    stats: Stats
    object: Literal["model"]
    owned_by: Literal["infinity"]
    created: int
    backend: str
    capabilities: list[Literal["embed", "classify", "rerank"]]


class ModelsReply(TypedDict):
    """The reply of /infinity/models."""

    data: list[Model]
    object: Literal["list"]


class HealthReply(TypedDict):
    """The reply of /infinity/health."""

    unix: float


_ERRORS = (Errors(Error), Errors(WrongFields, (422,)))
CONTRACTS: Contracts = {
    "/infinity/health": Contract((HealthReply,), ()),
    "/infinity/models": Contract((ModelsReply,), ()),
    "/infinity/embeddings": Contract((EmbeddingReply,), _ERRORS),
    "/infinity/rerank": Contract((RerankReply,), _ERRORS),
    "/infinity/classify": Contract((ClassifyReply,), _ERRORS),
}
