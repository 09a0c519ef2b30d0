"""Ollama's embeddings, and what its clients ask besides: the models, what each is, the version.

Source: Ollama's API, 0.12. Clients have names of Ollama's library, and add tags to ours: a lone model answers whatever it
is called, and `:latest` means nothing.
"""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

import poolhouse
from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InputTooLong
from poolhouse.server.dialects import _hosted, _replies
from poolhouse.server.dialects._fields import Many, body_schema
from poolhouse.server.dialects._hosted import Wish
from poolhouse.server.dialects.tei.info import is_splade
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.contract import Contract, Contracts, Errors, Matrix, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure, as_json, speak

_TAG = ":latest"
_NEVER = "9999-12-31T23:59:59Z"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Where /api/show stands for what Ollama reads from a GGUF file.
_FAMILY = "poolhouse"


class Options(BaseModel):
    """Of Ollama's options for a model those that mean something here."""

    model_config = ConfigDict(extra="ignore", strict=True)

    num_ctx: int | None = Field(None, ge=1, description="At most so many tokens of a text are read.")


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = Field(None, description="A served model; a lone one answers to any name.")
    options: Options = Options()
    keep_alive: Any = Field(None, description="Without effect: models stay loaded.")


class EmbedFields(_Fields):
    """The body of POST /api/embed."""

    input: str | Many[str] = []
    truncate: bool = Field(True, description="Cut texts over the limit instead of refusing them.")
    dimensions: int = Field(0, ge=0, description="For Matryoshka models; 0, or more than there are, leaves all.")


class EmbeddingsFields(_Fields):
    """The body of POST /api/embeddings, Ollama's former route."""

    prompt: str = ""


class ShowFields(BaseModel):
    """The body of POST /api/show."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    name: str | None = Field(None, description="A former word for model.")


def router(serving: Serving) -> APIRouter:
    routes = direct_router("ollama")

    @routes.post("/api/embed", openapi_extra=body_schema(EmbedFields))
    async def embed(http: Request) -> Response:
        """One vector of unit length per text."""
        speak(http, shape)
        return await _embed(serving, http, await serving.read(http, EmbedFields))

    @routes.post("/api/embeddings", openapi_extra=body_schema(EmbeddingsFields))
    async def embeddings(http: Request) -> Response:
        """The vector of one text, as the model has it."""
        speak(http, shape)
        return await _embeddings(serving, http, await serving.read(http, EmbeddingsFields))

    @routes.get("/api/tags")
    async def tags(_: Request) -> Response:
        """The served models."""
        return _json({"models": [_listed(serving, name) for name in serving.engines]})

    @routes.get("/api/ps")
    async def running(_: Request) -> Response:
        """The models in memory: all that are served."""
        loaded = {"expires_at": _NEVER, "size_vram": 0}
        return _json(
            {
                "models": [
                    _listed(serving, name) | loaded | {"context_length": engine.facts.max_tokens}
                    for name, engine in serving.engines.items()
                ]
            }
        )

    @routes.post("/api/show", openapi_extra=body_schema(ShowFields))
    async def show(http: Request) -> Response:
        """What a model is."""
        speak(http, shape)
        fields = await serving.read(http, ShowFields)
        return _json(_shown(serving, _engine(serving, fields.model or fields.name)))

    @routes.get("/api/version")
    async def version(_: Request) -> Response:
        """The version of Poolhouse."""
        return _json({"version": poolhouse.__version__})

    return routes


async def _embed(serving: Serving, http: Request, fields: EmbedFields) -> Response:
    started = time.perf_counter_ns()
    engine = _engine(serving, fields.model)
    texts = fields.input if isinstance(fields.input, list) else [fields.input] if fields.input else []
    wish = Wish(
        dimensions=_dimensions(engine, fields.dimensions),
        # SPLADE's weights are no directions, and stay as they are.
        use_activation=None if is_splade(engine) else True,
        truncate="END" if fields.truncate else "NONE",
        max_tokens=_most_tokens(engine, fields.options),
    )
    answers = await _hosted.embed(serving, http, engine, texts, wish) if texts else []

    def render() -> bytes:
        return dumps(
            {
                "model": engine.facts.name,
                "embeddings": np.stack(_hosted.arrays_of(answers)) if answers else [],
                "total_duration": time.perf_counter_ns() - started,
                "load_duration": 0,
                "prompt_eval_count": _replies.tokens_of(answers),
            }
        )

    return await _replies.write(serving, render, answers)


async def _embeddings(serving: Serving, http: Request, fields: EmbeddingsFields) -> Response:
    engine = _engine(serving, fields.model)
    wish = Wish(max_tokens=_most_tokens(engine, fields.options))
    answers: list[Answer] = []
    if fields.prompt:
        answers = await _hosted.embed(serving, http, engine, [fields.prompt], wish, parameter="prompt")
    vector: Any = answers[0].array if answers else []
    return await _replies.write(serving, lambda: dumps({"embedding": vector}), answers)


def _engine(serving: Serving, model: str | None) -> PoolingEngine:
    """The engine of a name that may have a tag."""
    if model is not None and model not in serving.engines:
        model = model.removesuffix(_TAG)
    return serving.lone_or_named(model)


def _dimensions(engine: PoolingEngine, asked: int) -> int | None:
    """What Ollama makes of `dimensions`: all there are, where more are asked for."""
    width = engine.facts.width
    return None if asked == 0 or (width is not None and asked >= width) else asked


def _most_tokens(engine: PoolingEngine, options: Options) -> int | None:
    """The tokens to cut at; None where the model's own limit holds."""
    return options.num_ctx if options.num_ctx is not None and options.num_ctx < engine.facts.max_tokens else None


def _listed(serving: Serving, name: str) -> dict[str, Any]:
    tagged = name if ":" in name.rpartition("/")[2] else f"{name}{_TAG}"
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": _time(serving.started),
        "size": 0,
        # Nobody here knows that of the files; clients tell models apart by it.
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": _details(serving.engines[name]),
    }


def _details(engine: PoolingEngine) -> dict[str, Any]:
    return {
        "parent_model": engine.facts.parent or "",
        "format": "safetensors",
        "family": _FAMILY,
        "families": [_FAMILY],
        "parameter_size": "",
        "quantization_level": _DTYPES.get(engine.facts.dtype, engine.facts.dtype),
    }


def _shown(serving: Serving, engine: PoolingEngine) -> dict[str, Any]:
    facts: dict[str, Any] = {"general.architecture": _FAMILY, f"{_FAMILY}.context_length": engine.facts.max_tokens}
    if engine.facts.width is not None:
        facts[f"{_FAMILY}.embedding_length"] = engine.facts.width
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(engine),
        "model_info": facts,
        "capabilities": ["embedding"] if "embed" in engine.facts.tasks else [],
        "modified_at": _time(serving.started),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _json(body: Any) -> Response:
    return Response(dumps(body), media_type="application/json")


def shape(failure: Failure) -> Response:
    """Ollama's error body; clients know the first words of too long an input."""
    message = failure.message
    if isinstance(failure.error, InputTooLong):
        message = f"the input length exceeds the context length: {message}"
    return as_json(failure, {"error": message})


class Error(TypedDict):
    """An error in Ollama's shape."""

    error: str


class EmbedReply(TypedDict):
    """The reply of /api/embed; durations are nanoseconds."""

    model: str
    embeddings: Matrix
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class EmbeddingsReply(TypedDict):
    """The reply of /api/embeddings."""

    embedding: Vector


class Details(TypedDict):
    """How a model is stored."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Listed(TypedDict):
    """A served model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class TagsReply(TypedDict):
    """The reply of /api/tags."""

    models: list[Listed]


class Running(Listed):
    """A model in memory."""

    expires_at: str
    size_vram: int
    context_length: int


class RunningReply(TypedDict):
    """The reply of /api/ps."""

    models: list[Running]


class ShowReply(TypedDict):
    """The reply of /api/show."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, str | int]
    capabilities: list[Literal["embedding"]]
    modified_at: str


class VersionReply(TypedDict):
    """The reply of /api/version."""

    version: str


_ERRORS = (Errors(Error),)
CONTRACTS: Contracts = {
    "/api/embed": Contract((EmbedReply,), _ERRORS),
    "/api/embeddings": Contract((EmbeddingsReply,), _ERRORS),
    "/api/tags": Contract((TagsReply,), ()),
    "/api/ps": Contract((RunningReply,), ()),
    "/api/show": Contract((ShowReply,), _ERRORS),
    "/api/version": Contract((VersionReply,), ()),
}
