"""Ollama: embeddings, and what its clients ask besides: the models, what each is, the version.

Source: Ollama's API, 0.12. Clients have names of Ollama's library, and add tags to ours: a single model answers whatever it
is called, and `:latest` means nothing.
"""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime
from typing import Literal

import numpy as np
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.server.call import Call, as_json
from poolhouse.server.dialects import _hosted, _replies
from poolhouse.server.dialects._fields import Many, Strict
from poolhouse.server.dialects._hosted import EmbedOptions
from poolhouse.server.dialects.tei.info import is_splade
from poolhouse.server.engines import Engines
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire import errors
from poolhouse.server.wire.contract import Errors, Matrix, Vector
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import Failure
from poolhouse.version import __version__

_TAG = ":latest"
_NEVER = "9999-12-31T23:59:59Z"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Stands in /api/show for the family that Ollama reads from a GGUF file.
_FAMILY = "poolhouse"


class Options(Strict):
    """Of Ollama's options for a model those that mean something here."""

    num_ctx: int | None = Field(None, ge=1, description="At most so many tokens of a text are read.")


class _Fields(Strict):
    model: str | None = Field(None, description="A served model; a single one answers to any name.")
    options: Options = Options()
    keep_alive: object = Field(None, description="Without effect: models stay loaded.")
    images: object = Field(None, description="Refused: Ollama's API embeds texts alone.")

    def refuse_pictures(self) -> None:
        """Raise InvalidRequest for pictures, which Ollama's API would leave out without a word."""
        if self.images:
            raise InvalidRequest("images: this API embeds texts; /v1/embeddings reads pictures in messages.", "images")


class EmbedFields(_Fields):
    """The body of POST /api/embed."""

    input: str | Many[str] = Field([], description="A text, or several.")
    truncate: bool = Field(True, description="Cut texts over the limit instead of refusing them.")
    dimensions: int = Field(0, ge=0, description="For Matryoshka models; 0, or more than there are, leaves all.")


class EmbeddingsFields(_Fields):
    """The body of POST /api/embeddings, Ollama's former route."""

    prompt: str = ""


class ShowFields(Strict):
    """The body of POST /api/show."""

    model: str | None = None
    name: str | None = Field(None, description="The former name of this field.")


async def embed(call: Call, fields: EmbedFields) -> Response:
    """One vector of unit length per text."""
    fields.refuse_pictures()
    engine = _use(call, fields.model)
    texts = fields.input if isinstance(fields.input, list) else [fields.input] if fields.input else []
    options = EmbedOptions(
        dimensions=_dimensions(engine, fields.dimensions),
        # SPLADE's weights are no directions, and stay as they are.
        use_activation=None if is_splade(engine) else True,
        truncate="END" if fields.truncate else "NONE",
        max_tokens=_max_tokens(engine, fields.options),
    )
    answers = await _hosted.embed(call, texts, options) if texts else []

    def render() -> bytes:
        return dumps(
            {
                "model": engine.facts.name,
                "embeddings": np.stack(_hosted.arrays_of(answers)) if answers else [],
                "total_duration": round((time.perf_counter() - call.started) * 1e9),
                "load_duration": 0,
                "prompt_eval_count": _replies.tokens_of(answers),
            }
        )

    return await call.write(render, answers)


async def embeddings(call: Call, fields: EmbeddingsFields) -> Response:
    """The vector of one text, as the model has it."""
    fields.refuse_pictures()
    engine = _use(call, fields.model)
    answers: list[Answer] = []
    if fields.prompt:
        options = EmbedOptions(max_tokens=_max_tokens(engine, fields.options))
        answers = await _hosted.embed(call, [fields.prompt], options, parameter="prompt")
    return await call.write(lambda: dumps({"embedding": answers[0].array if answers else []}), answers)


async def tags(call: Call) -> Response:
    """The served models."""
    return as_json({"models": [_listed(call.engines, name) for name in call.engines.by_name]})


async def running(call: Call) -> Response:
    """The models in memory: all that are served."""
    models: list[Running] = [
        {
            **_listed(call.engines, name),
            "expires_at": _NEVER,
            "size_vram": 0,
            "context_length": engine.facts.max_tokens,
        }
        for name, engine in call.engines.by_name.items()
    ]
    return as_json({"models": models})


async def show(call: Call, fields: ShowFields) -> Response:
    """What a model is."""
    engine = _use(call, fields.model or fields.name)
    facts: dict[str, str | int] = {
        "general.architecture": _FAMILY,
        f"{_FAMILY}.context_length": engine.facts.max_tokens,
    }
    if engine.facts.width is not None:
        facts[f"{_FAMILY}.embedding_length"] = engine.facts.width
    body: ShowReply = {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(engine),
        "model_info": facts,
        "capabilities": ["embedding"] if "embed" in engine.facts.tasks else [],
        "modified_at": _time(call.engines.started),
    }
    return as_json(body)


async def version(_: Call) -> Response:
    """The version of Poolhouse."""
    return as_json({"version": __version__})


def _use(call: Call, model: str | None) -> PoolingEngine:
    """Choose the engine of a name that may have a tag."""
    if model is not None and model not in call.engines.by_name:
        model = model.removesuffix(_TAG)
    call.engine = call.engines.single_or_named(model)
    return call.engine


def _dimensions(engine: PoolingEngine, requested: int) -> int | None:
    """What Ollama makes of `dimensions`: all there are, where more are requested."""
    width = engine.facts.width
    return None if requested == 0 or (width is not None and requested >= width) else requested


def _max_tokens(engine: PoolingEngine, options: Options) -> int | None:
    """The tokens to cut at; None where the model's own limit holds."""
    return options.num_ctx if options.num_ctx is not None and options.num_ctx < engine.facts.max_tokens else None


def _listed(engines: Engines, name: str) -> Listed:
    tagged = name if ":" in name.rpartition("/")[2] else f"{name}{_TAG}"
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": _time(engines.started),
        "size": 0,
        # The server does not know the files' digest; clients tell models apart by this one.
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": _details(engines.by_name[name]),
    }


def _details(engine: PoolingEngine) -> Details:
    return {
        "parent_model": engine.facts.parent or "",
        "format": "safetensors",
        "family": _FAMILY,
        "families": [_FAMILY],
        "parameter_size": "",
        "quantization_level": _DTYPES.get(engine.facts.dtype, engine.facts.dtype),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def shape(failure: Failure) -> Response:
    """Ollama's error body; clients know too long an input by its first words."""
    message = failure.message
    if isinstance(failure.error, InputTooLong):
        message = f"the input length exceeds the context length: {message}"
    return errors.as_json(failure, {"error": message})


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


ERRORS = (Errors(Error),)
DIALECT = Dialect(
    "ollama",
    (
        Route("POST", "/api/embed", embed, EmbedFields, (EmbedReply,)),
        Route("POST", "/api/embeddings", embeddings, EmbeddingsFields, (EmbeddingsReply,)),
        Route("GET", "/api/tags", tags, replies=(TagsReply,)),
        Route("GET", "/api/ps", running, replies=(RunningReply,)),
        Route("POST", "/api/show", show, ShowFields, (ShowReply,)),
        Route("GET", "/api/version", version, replies=(VersionReply,)),
    ),
    shape,
    ERRORS,
    owns=("/api",),
)
