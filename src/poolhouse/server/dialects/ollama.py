"""Ollama: embeddings, and what its clients ask besides: the models, what each is, the version.

Source: Ollama's API, 0.12. Clients have names of Ollama's library, and add tags to ours: a single model answers whatever it
is called, and `:latest` means nothing.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import EngineFacts, PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.server.call import Call, as_json
from poolhouse.server.dialects import _hosted, _replies, extract
from poolhouse.server.dialects._fields import Many, Strict
from poolhouse.server.dialects._hosted import EmbedOptions
from poolhouse.server.dialects.extract import LABELS_SCHEMA, Part, Wanted
from poolhouse.server.dialects.tei.info import is_splade
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.served import Listed
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
    keep_alive: float | str | None = Field(
        None, description="How long a model on demand stays in memory: seconds, or 5m; 0 unloads it, -1 keeps it."
    )
    images: object = Field(None, description="Refused: Ollama's API embeds texts alone.")

    @property
    def keep_seconds(self) -> float | None:
        """Seconds of keep_alive; None where it is left out.

        Raises:
            InvalidRequest: no duration.
        """
        return None if self.keep_alive is None else _seconds(self.keep_alive)

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


class ExtractFields(_Fields):
    """The body of POST /api/extract, which Ollama's developers have proposed."""

    input: str | Many[str] = Field(description="A text, or several.")
    labels: Any = Field(description="Names of what to look for.", json_schema_extra=LABELS_SCHEMA)
    threshold: float = Field(0.5, ge=0, le=1)


class ShowFields(Strict):
    """The body of POST /api/show."""

    model: str | None = None
    name: str | None = Field(None, description="The former name of this field.")


async def embed(call: Call, fields: EmbedFields) -> Response:
    """One vector of unit length per text."""
    fields.refuse_pictures()
    texts = fields.input if isinstance(fields.input, list) else [fields.input] if fields.input else []
    if not texts and fields.keep_seconds == 0:
        return await _unload(call, fields)
    engine = await _use(call, fields)
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
                "load_duration": round(call.load_seconds * 1e9),
                "prompt_eval_count": _replies.tokens_of(answers),
            }
        )

    return await call.write(render, answers)


async def embeddings(call: Call, fields: EmbeddingsFields) -> Response:
    """The vector of one text, as the model has it."""
    fields.refuse_pictures()
    if not fields.prompt and fields.keep_seconds == 0:
        return await _unload(call, fields)
    engine = await _use(call, fields)
    answers: list[Answer] = []
    if fields.prompt:
        options = EmbedOptions(max_tokens=_max_tokens(engine, fields.options))
        answers = await _hosted.embed(call, [fields.prompt], options, parameter="prompt")
    return await call.write(lambda: dumps({"embedding": answers[0].array if answers else []}), answers)


async def extract_entities(call: Call, fields: ExtractFields) -> Response:
    """The parts of a text that fit one of the labels; of several texts, a list of these for each."""
    fields.refuse_pictures()
    engine = await _use(call, fields)
    texts = [fields.input] if isinstance(fields.input, str) else fields.input
    found = await extract.find(call, texts, Wanted(fields.labels, fields.threshold), "input")
    for item in found.items:
        if isinstance(item, InvalidRequest):
            raise item

    def render() -> bytes:
        entities = found.items[0] if isinstance(fields.input, str) else found.items
        return dumps(
            {
                "model": engine.facts.name,
                "entities": entities,
                "total_duration": round((time.perf_counter() - call.started) * 1e9),
                "load_duration": round(call.load_seconds * 1e9),
                "prompt_eval_count": _replies.tokens_of(found.answers),
            }
        )

    return await call.write(render, found.answers)


async def tags(call: Call) -> Response:
    """The served models."""
    return as_json({"models": [_listed(one) for one in await call.engines.refreshed()]})


async def running(call: Call) -> Response:
    """The models in memory, and when each leaves it."""
    models: list[Running] = [
        {
            **_listed(one),
            "size": one.memory_bytes,
            "expires_at": _NEVER if one.expires is None else _time(one.expires),
            "size_vram": 0 if one.facts.device == "cpu" else one.memory_bytes,
            "context_length": one.facts.max_tokens,
        }
        for one in call.engines.listed()
        if one.state == "loaded" and one.facts is not None
    ]
    return as_json({"models": models})


async def show(call: Call, fields: ShowFields) -> Response:
    """What a model is; of one that was never loaded only what its files say."""
    engines = call.engines
    one = engines.described(await engines.find(_without_tag(call, fields.model or fields.name), any_name=True))
    facts: dict[str, str | int] = {"general.architecture": _FAMILY}
    if one.facts is not None:
        facts[f"{_FAMILY}.context_length"] = one.facts.max_tokens
        if one.facts.width is not None:
            facts[f"{_FAMILY}.embedding_length"] = one.facts.width
    body: ShowReply = {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(one.facts),
        "model_info": facts,
        "capabilities": ["embedding"] if one.facts is not None and "embed" in one.facts.tasks else [],
        "modified_at": _time(one.since),
    }
    return as_json(body)


async def version(_: Call) -> Response:
    """The version of Poolhouse."""
    return as_json({"version": __version__})


async def _use(call: Call, fields: _Fields) -> PoolingEngine:
    """Choose the engine of a name that may have a tag, and say how long it stays."""
    seconds = fields.keep_seconds
    engine = await call.use(_without_tag(call, fields.model), any_name=True)
    if seconds is not None:
        call.engines.keep(engine.facts.name, seconds)
    return engine


async def _unload(call: Call, fields: _Fields) -> Response:
    """Close a model, without loading it before."""
    name = await call.engines.find(_without_tag(call, fields.model), any_name=True)
    call.engines.unload(name)
    empty: EmbedReply | EmbeddingsReply = {"embedding": []}
    if isinstance(fields, EmbedFields):
        empty = {"model": name, "embeddings": [], "total_duration": 0, "load_duration": 0, "prompt_eval_count": 0}
    return as_json(empty)


def _without_tag(call: Call, model: str | None) -> str | None:
    return model if model is None or call.engines.has(model) else model.removesuffix(_TAG)


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = rf"(\d+\.?\d*|\.\d+)({'|'.join(_UNITS)})"
_DURATION = re.compile(rf"([+-]?)((?:{_PART})+)")
# Longer is for ever: a century.
_LONGEST = 100 * 365 * 86400.0


def _seconds(duration: float | str) -> float:
    """Seconds of a number, or of Go's form of a duration (1h30m); less than none is for ever.

    Raises:
        InvalidRequest: it is neither.
    """
    found = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if found is not None:
        parts = re.findall(_PART, found[2])
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts) * (-1 if found[1] == "-" else 1)
    else:
        try:
            seconds = float(duration)
        except ValueError:
            seconds = math.nan
    if math.isnan(seconds):
        raise InvalidRequest("keep_alive is seconds, or a duration such as 5m; 0 unloads, -1 keeps.", "keep_alive")
    return seconds if 0 <= seconds <= _LONGEST else math.inf


def _dimensions(engine: PoolingEngine, requested: int) -> int | None:
    """What Ollama makes of `dimensions`: all there are, where more are requested."""
    width = engine.facts.width
    return None if requested == 0 or (width is not None and requested >= width) else requested


def _max_tokens(engine: PoolingEngine, options: Options) -> int | None:
    """The tokens to cut at; None where the model's own limit holds."""
    return options.num_ctx if options.num_ctx is not None and options.num_ctx < engine.facts.max_tokens else None


def _listed(one: Listed) -> Tagged:
    name = one.name
    tagged = name if ":" in name.rpartition("/")[2] else f"{name}{_TAG}"
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": _time(one.since),
        "size": one.weight_bytes,
        # The server does not know the files' digest; clients tell models apart by this one.
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": _details(one.facts),
    }


def _details(facts: EngineFacts | None) -> Details:
    return {
        "parent_model": (facts and facts.parent) or "",
        "format": "safetensors",
        "family": _FAMILY,
        "families": [_FAMILY],
        "parameter_size": "",
        "quantization_level": "" if facts is None else _DTYPES.get(facts.dtype, facts.dtype),
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


class Tagged(TypedDict):
    """A served model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class TagsReply(TypedDict):
    """The reply of /api/tags."""

    models: list[Tagged]


class Running(Tagged):
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


class EntitiesReply(TypedDict):
    """The reply of /api/extract."""

    model: str
    entities: list[Part] | list[list[Part]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class VersionReply(TypedDict):
    """The reply of /api/version."""

    version: str


ERRORS = (Errors(Error),)
DIALECT = Dialect(
    "ollama",
    (
        Route("POST", "/api/embed", embed, EmbedFields, (EmbedReply,)),
        Route("POST", "/api/embeddings", embeddings, EmbeddingsFields, (EmbeddingsReply,)),
        Route("POST", "/api/extract", extract_entities, ExtractFields, (EntitiesReply,)),
        Route("GET", "/api/tags", tags, replies=(TagsReply,)),
        Route("GET", "/api/ps", running, replies=(RunningReply,)),
        Route("POST", "/api/show", show, ShowFields, (ShowReply,)),
        Route("GET", "/api/version", version, replies=(VersionReply,)),
    ),
    shape,
    ERRORS,
    owns=("/api",),
)
