"""Infinity: its routes under /infinity; `usage` counts tokens, where Infinity counts characters.

Source: infinity 0.0.77.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, StringConstraints, ValidationError
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import Prompt
from poolhouse.params import PoolingParams
from poolhouse.server.call import Call, as_json
from poolhouse.server.dialects import _hosted, _replies, health
from poolhouse.server.dialects._fields import Many, Strict
from poolhouse.server.dialects._hosted import EmbedOptions
from poolhouse.server.dialects._replies import TokenCounts
from poolhouse.server.dialects.vllm.classify import label_names, ranked_labels
from poolhouse.server.engines import Engines
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.served import Listed
from poolhouse.server.wire import errors
from poolhouse.server.wire.contract import Cut, Errors, Matrix, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, WrongField, problems
from poolhouse.tasks import Task

# Infinity strips what it reads.
_Text = Annotated[str, StringConstraints(strip_whitespace=True)]
_Texts = Annotated[Many[_Text], Field(min_length=1)]
# What Infinity calls a model that is not named.
_NO_MODEL = "default/not-specified"
Capability = Literal["embed", "classify", "rerank", "image_embed"]


class _Fields(Strict):
    model: str = _NO_MODEL

    @property
    def name(self) -> str | None:
        """The model; None where the body names none."""
        return None if self.model == _NO_MODEL else self.model


class ImageFields(_Fields):
    """The body of POST /infinity/embeddings_image."""

    input: _Text | _Texts = Field(description="Pictures: URLs or data URIs.")
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    dimensions: int = Field(
        0,
        ge=0,
        description="0 leaves vectors as they are.",
        validation_alias=AliasChoices("dimensions", "output_dimension"),  # LiteLLM writes the second
    )


class EmbeddingFields(ImageFields):
    """The body of POST /infinity/embeddings."""

    input: _Text | _Texts
    modality: Literal["text", "image", "audio"] = Field("text", description="What the inputs are; sounds are refused.")


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


async def alive(call: Call) -> Response:
    """The time, while every engine can answer; else 503."""
    status = health.answer(call.engines).status_code
    return Response(dumps({"unix": time.time()}), status, media_type="application/json")


async def models(call: Call) -> Response:
    """The served models and what they can do."""
    data = [_model(call.engines, one) for one in await call.engines.refreshed()]
    return as_json({"data": data, "object": "list"})


async def embeddings(call: Call, fields: EmbeddingFields) -> Response:
    """One vector per input, or one per token where the model has no other."""
    if fields.modality == "audio":
        raise InvalidRequest("modality 'audio': texts and pictures are read here.", "modality")
    return await _embed(call, fields, of_pictures=fields.modality == "image")


async def embeddings_image(call: Call, fields: ImageFields) -> Response:
    """One vector per picture, as of `modality` image."""
    return await _embed(call, fields, of_pictures=True)


async def _embed(call: Call, fields: ImageFields, of_pictures: bool) -> Response:
    engine = await call.use(fields.name)
    inputs = [fields.input] if isinstance(fields.input, str) else fields.input
    contents = _hosted.pictures(call.engines, inputs, "input") if of_pictures else inputs
    task: Task = "embed" if "embed" in engine.facts.tasks else "token_embed"
    answers = await _hosted.embed(call, contents, EmbedOptions(dimensions=fields.dimensions or None), task=task)

    def render() -> bytes:
        arrays = _hosted.arrays_of(answers)
        vectors = _hosted.vectors(call, arrays, fields.encoding_format, "encoding_format")
        data = list(_hosted.embedding_objects(vectors, answers))
        return dumps({"object": "list", "data": data, **_tail(call, answers)})

    return await call.write(render, answers)


async def rerank(call: Call, fields: RerankFields) -> Response:
    """Documents by how well they answer a query, best first."""
    await call.use(fields.name)
    scored = await _hosted.rerank(call, fields.query, fields.documents, use_activation=not fields.raw_scores)
    results: list[Ranked] = [
        {
            "relevance_score": score,
            "index": index,
            "document": fields.documents[index] if fields.return_documents else None,
        }
        for index, score in scored.best(fields.top_n)
    ]
    body: RerankReply = {"object": "rerank", "results": results, **_tail(call, scored.answers)}
    return await call.write(lambda: dumps(body), scored.answers)


async def classify(call: Call, fields: ClassifyFields) -> Response:
    """Every label of each input, likeliest first."""
    facts = (await call.use(fields.name)).facts
    if "classify" not in facts.tasks:
        raise UnsupportedTask(f"The model `{facts.name}` has no labels; its tasks: {list(facts.tasks)}.", "model")
    call.engines.check_items(len(fields.input), "input")
    params = PoolingParams(use_activation=not fields.raw_scores, truncate_prompt_tokens=-1)
    answers = await call.answers([EngineRequest(Prompt(text), "classify", params) for text in fields.input])
    names = label_names(call.engine)
    data = [ranked_labels(answer, names) for answer in answers]
    body = {"object": "classify", "data": data, **_tail(call, answers)}
    return await call.write(lambda: dumps(body), answers)


def _tail(call: Call, answers: Sequence[Answer]) -> Tail:
    return {
        "model": call.engine.facts.name,
        "usage": _replies.token_counts(answers),
        "id": call.reply_id("infinity"),
        "created": int(time.time()),
    }


def _model(engines: Engines, listed: Listed) -> Model:
    facts, waiting = listed.facts, listed.waiting
    capabilities: list[Capability] = []
    # What a model can do is known once it was loaded.
    if facts is not None:
        capabilities = [task for task in facts.tasks if task in ("embed", "classify")]
        if facts.labels in (0, 1):
            capabilities.append("rerank")
        if facts.pictures and {"embed", "token_embed"} & set(facts.tasks):
            capabilities.append("image_embed")
    return {
        "id": listed.name,
        "stats": {
            "queue_fraction": waiting / engines.settings.max_queued_prompts,
            "queue_absolute": waiting,
            "results_pending": waiting,
            "batch_size": engines.settings.max_client_batch_size,
        },
        "object": "model",
        "owned_by": "infinity",
        "created": int(listed.since),
        "backend": "poolhouse",
        "capabilities": capabilities,
    }


def shape(failure: Failure) -> Response:
    """Infinity's error body: FastAPI's for wrong fields, OpenAI's for the rest, where an unknown model is a 400."""
    failure = _hosted.with_their_statuses(failure)
    if isinstance(failure.error, ValidationError):
        return errors.as_json(failure, {"detail": problems(failure.error)})
    error = {"message": failure.message, "type": None, "param": failure.parameter, "code": failure.status}
    return errors.as_json(failure, {"error": error})


class Problem(TypedDict):
    """What went wrong."""

    message: str
    type: None
    param: str | None
    code: int


class Error(TypedDict):
    """An error in Infinity's shape."""

    error: Problem


class WrongFields(TypedDict):
    """An error of a body whose fields are wrong."""

    detail: list[WrongField]


class Tail(TypedDict):
    """What all replies end with."""

    model: str
    usage: TokenCounts
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
    """A document's index and score."""

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
    capabilities: list[Capability]


class ModelsReply(TypedDict):
    """The reply of /infinity/models."""

    data: list[Model]
    object: Literal["list"]


class HealthReply(TypedDict):
    """The reply of /infinity/health."""

    unix: float


ERRORS = (Errors(Error), Errors(WrongFields, (422,)))
DIALECT = Dialect(
    "infinity",
    (
        Route("GET", "/health", alive, replies=(HealthReply,)),
        Route("GET", "/models", models, replies=(ModelsReply,)),
        Route("POST", "/embeddings", embeddings, EmbeddingFields, (EmbeddingReply,)),
        Route("POST", "/embeddings_image", embeddings_image, ImageFields, (EmbeddingReply,)),
        Route("POST", "/rerank", rerank, RerankFields, (RerankReply,)),
        Route("POST", "/classify", classify, ClassifyFields, (ClassifyReply,)),
    ),
    shape,
    ERRORS,
    prefix="/infinity",
    owns=("/infinity",),
)
