"""Superlinked's inference engine (SIE): encode and score; the path names the model, which may hold slashes.

JSON, or msgpack with numpy arrays where the body or the Accept header says so (its SDK speaks nothing else).
Source: sie_server 0.10.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NotRequired

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import EngineClosed, EngineError, InputTooLong, InvalidRequest, UnknownModel
from poolhouse.outputs import Array, SparseVector
from poolhouse.plans import scoring, sparse
from poolhouse.server.dialects import _hosted, _replies
from poolhouse.server.dialects._fields import Many, body_schema
from poolhouse.server.dialects._hosted import Wish
from poolhouse.server.dialects._pairs import Scored, Sides, score
from poolhouse.server.engines import FieldsT, Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.body import read_bytes, read_json
from poolhouse.server.wire.contract import STATUSES, Contract, Contracts, Errors, Matrix, Vector
from poolhouse.server.wire.encoding import Numbers, dumps
from poolhouse.server.wire.errors import Failure, Refused, as_json, speak
from poolhouse.tasks import Task

Output = Literal["dense", "sparse", "multivector"]
Dtype = Literal["float32", "float16", "int8", "uint8", "binary"]
_TASKS: dict[Output, Task] = {"dense": "embed", "multivector": "token_embed"}
# What `score_mode` is called here, and how hybrid weighs dense, sparse and colbert.
_MODES = {"dense": "dense", "sparse": "sparse", "colbert": "colbert", "hybrid": "weighted"}
_HYBRID = (0.4, 0.2, 0.4)
_MSGPACK = ("application/msgpack", "application/x-msgpack")
_MEDIA = ("images", "audio", "video", "document")


class Item(BaseModel):
    """A text, and what the reply calls it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | None = None
    text: str | None = None
    images: Any = Field(None, description="Refused, as other media: no model here reads them.")
    audio: Any = None
    video: Any = None
    document: Any = None

    def words(self, place: str) -> str:
        """The text.

        Raises:
            InvalidRequest: none, or media.
        """
        for name in _MEDIA:
            if getattr(self, name):
                raise InvalidRequest(f"{place} has {name}; the models of this server read texts.", f"{place}.{name}")
        if self.text is None:
            raise InvalidRequest(f"{place} has no text.", f"{place}.text")
        return self.text


class EncodeOptions(BaseModel):
    """Options of a model; those of others are left to them."""

    model_config = ConfigDict(extra="ignore", strict=True)

    is_query: bool = Field(False, description="Whether the texts are queries; else they are documents.")
    output_dtype: Dtype | None = None
    instruction: str | None = None


class EncodeParams(BaseModel):
    """Which vectors are wanted, and how."""

    model_config = ConfigDict(extra="ignore", strict=True)

    output_types: Many[Output] | None = Field(None, description="Default: dense.")
    output_dtype: Dtype | None = Field(None, description="Default: float32. Of sparse vectors the first two alone.")
    instruction: str | None = Field(None, description="Refused: prompts are the checkpoint's own.")
    options: EncodeOptions | None = None


class EncodeFields(BaseModel):
    """The body of POST /v1/encode/{model}."""

    model_config = ConfigDict(extra="ignore", strict=True)

    items: Many[Item] = Field(min_length=1)
    params: EncodeParams | None = None


class ScoreOptions(BaseModel):
    """Options of a model; those of others are left to them."""

    model_config = ConfigDict(extra="ignore", strict=True)

    score_mode: Literal["dense", "sparse", "colbert", "hybrid"] | None = None
    score_weights: Many[float] | None = Field(None, description="Of hybrid: of dense, sparse and colbert.")
    instruction: str | None = None


class ScoreFields(BaseModel):
    """The body of POST /v1/score/{model}."""

    model_config = ConfigDict(extra="ignore", strict=True)

    query: Item
    items: Many[Item] = Field(min_length=1)
    instruction: str | None = Field(None, description="What makes an item fit, for models that read one.")
    options: ScoreOptions | None = None


def router(serving: Serving) -> APIRouter:
    routes = direct_router("sie")

    @routes.post("/v1/encode/{model:path}", openapi_extra=body_schema(EncodeFields))
    async def encode(http: Request) -> Response:
        """Dense, sparse and token vectors of each item, from one pass."""
        speak(http, shape)
        return await _encode(serving, http, await _read(serving, http, EncodeFields))

    @routes.post("/v1/score/{model:path}", openapi_extra=body_schema(ScoreFields))
    async def score_items(http: Request) -> Response:
        """Items by how well they answer a query, best first."""
        speak(http, shape)
        return await _score(serving, http, await _read(serving, http, ScoreFields))

    return routes


async def _read(serving: Serving, http: Request, fields: type[FieldsT]) -> FieldsT:
    """The body, of JSON or msgpack."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    of_msgpack = kind in _MSGPACK
    body = await (_unpacked(serving, http) if of_msgpack else read_json(http, serving.settings))
    serving.check_list(body.get("items"), "items")
    return serving.parse(body, fields)


async def _unpacked(serving: Serving, http: Request) -> dict[str, Any]:
    raw = await read_bytes(http, serving.settings)
    try:
        body = _msgpack(415).unpackb(raw, raw=False)
    except (ValueError, RecursionError) as error:
        raise Refused(f"The body is not valid msgpack: {error or type(error).__name__}", parameter="body") from None
    if not isinstance(body, dict):
        raise Refused("The body must be a map.", parameter="body")
    return body


async def _encode(serving: Serving, http: Request, fields: EncodeFields) -> Response:
    started = time.perf_counter()
    write = _writer(http)
    engine = serving.engine(http.path_params["model"])
    params = fields.params or EncodeParams()
    options = params.options or EncodeOptions()
    if params.instruction or options.instruction:
        raise InvalidRequest(
            "instruction cannot be given here: the checkpoint's prompts hold, by options.is_query.",
            "params.instruction",
        )
    texts = [item.words(f"items[{index}]") for index, item in enumerate(fields.items)]
    outputs: list[Output] = list(dict.fromkeys(params.output_types or ["dense"]))
    weigh = sparse.plan(engine, (), sparse.Options()) if "sparse" in outputs else None
    tasks = {output: _TASKS[output] if weigh is None or output != "sparse" else weigh.head.task for output in outputs}
    first, *further = dict.fromkeys(tasks.values())
    wish = Wish("query" if options.is_query else "document")
    requests = [
        replace(request, further=tuple(further))
        for request in _hosted.requests(serving, engine, texts, wish, first, "items")
    ]
    answers = await serving.answers(http, engine, requests, "items[{}]".format)
    dtype: Dtype = params.output_dtype or options.output_dtype or "float32"

    def vectors(answer: Answer) -> dict[str, Any]:
        arrays = {first: answer.array, **answer.further}
        made: dict[str, Any] = {}
        for output, task in tasks.items():
            array = arrays[task]
            if output == "dense":
                made["dense"] = {"dims": len(array), "dtype": dtype, "values": quantized(array, dtype)}
            elif output == "multivector":
                size = {"token_dims": array.shape[1], "num_tokens": len(array)}
                made["multivector"] = {**size, "dtype": dtype, "values": quantized(array, dtype)}
            elif weigh is not None:
                made["sparse"] = _sparse(weigh.each(replace(answer, array=array)).vector, engine, array, dtype)
        return made

    def render() -> Response:
        items = [{} if item.id is None else {"id": item.id} for item in fields.items]
        items = [item | vectors(answer) | _replies.cut(answer) for item, answer in zip(items, answers, strict=True)]
        timing = _timing(answers, started)
        usage = {"input_tokens": _replies.tokens_of(answers)}
        return write({"model": engine.facts.name, "items": items, "timing": timing, "usage": usage})

    return await _replies.write(serving, render, answers)


async def _score(serving: Serving, http: Request, fields: ScoreFields) -> Response:
    write = _writer(http)
    engine = serving.engine(http.path_params["model"])
    options = fields.options or ScoreOptions()
    mode = None if options.score_mode is None else _MODES[options.score_mode]
    weights = None if options.score_weights is None else tuple(options.score_weights)
    if mode == "weighted":
        weights = weights or _HYBRID
    elif weights is not None:
        raise InvalidRequest("score_weights are for score_mode hybrid.", "options.score_weights")
    documents = [item.words(f"items[{index}]") for index, item in enumerate(fields.items)]
    sides = Sides([fields.query.words("query")], documents, ("query", "items"))
    asked = scoring.Asked(Wish().params, fields.instruction or options.instruction or None, mode=mode, weights=weights)
    scored = await score(serving, http, engine, sides, asked)
    body = {
        "model": engine.facts.name,
        "query_id": fields.query.id,
        "scores": _ranking(fields.items, scored),
        "usage": {"input_tokens": _replies.tokens_of(scored.answers)},
    }
    return await _replies.write(serving, lambda: write(body), scored.answers)


def _ranking(items: Sequence[Item], scored: Scored) -> list[dict[str, Any]]:
    """The items, best first; one without an id is called by its place."""
    return [
        {
            "item_id": f"item-{place}" if items[place].id is None else items[place].id,
            "score": scored.scores[place].score,
            "rank": rank,
        }
        for rank, place in enumerate(scored.ranked())
    ]


def quantized(array: Array, dtype: Dtype) -> Numbers:
    """Vectors in that type, each by itself: int8 by its largest number, uint8 by its range, binary by signs, packed.

    array: [..., width]
    """
    if dtype == "float32":
        return np.ascontiguousarray(array)
    if dtype == "float16":
        return array.astype(np.float16)
    if dtype == "binary":
        return np.packbits(array > 0, axis=-1)
    low = array.min(axis=-1, keepdims=True)
    if dtype == "uint8":
        span = array.max(axis=-1, keepdims=True) - low
        codes = np.round((array - low) / np.where(span == 0, 1, span) * 255)
        return np.where(span == 0, 128, codes).astype(np.uint8)
    largest = np.abs(array).max(axis=-1, keepdims=True)
    return np.round(array / np.where(largest == 0, 1, largest) * 127).astype(np.int8)


def _sparse(vector: SparseVector, engine: PoolingEngine, array: Array, dtype: Dtype) -> dict[str, Any]:
    kept: Dtype = "float16" if dtype == "float16" else "float32"
    of_vocabulary = engine.facts.sparse is not None and engine.facts.sparse.unit != "token"
    return {
        "dims": len(array) if of_vocabulary else None,
        "dtype": kept,
        "indices": vector.ids,
        "values": quantized(vector.weights, kept),
    }


def _timing(answers: Sequence[Answer], started: float) -> dict[str, float]:
    """Milliseconds: of the whole, and the longest that an item took in each part."""
    timings = [answer.timing for answer in answers]
    return {
        "total_ms": 1000 * (time.perf_counter() - started),
        "queue_ms": 1000 * max(timing.queue_seconds for timing in timings),
        "tokenization_ms": 1000 * max(timing.tokenize_seconds for timing in timings),
        "inference_ms": 1000 * max(timing.run_seconds for timing in timings),
    }


def _writer(http: Request) -> Callable[[Any], Response]:
    """How the reply is written: JSON, unless the client asks for msgpack."""
    kind = next((kind for kind in _MSGPACK if kind in http.headers.get("accept", "").lower()), None)
    if kind is None:
        return lambda body: Response(dumps(body), media_type="application/json")
    pack = _msgpack(406).packb
    return lambda body: Response(pack(body, default=_as_map), media_type=kind)


def _msgpack(status: int) -> Any:
    """The library that reads and writes msgpack.

    Raises:
        Refused: it is not installed; with that status.
    """
    try:
        import msgpack
    except ImportError:
        words = "msgpack is not installed here (pip install 'poolhouse[msgpack]'); send and accept application/json."
        raise Refused(words, status) from None
    return msgpack


def _as_map(value: Any) -> dict[bytes, Any]:
    """A numpy array as msgpack-numpy writes it."""
    array = np.ascontiguousarray(value)
    return {
        b"nd": True,
        b"type": array.dtype.str,
        b"kind": b"",
        b"shape": array.shape,
        b"data": array.tobytes(),
    }


def shape(failure: Failure) -> Response:
    """SIE's error body; a full queue is a 503, which its clients ask again."""
    failure = replace(failure, status=503) if failure.status == 429 else failure
    return as_json(failure, {"detail": {"code": _code(failure), "message": failure.message}})


def _code(failure: Failure) -> str:
    """SIE's word for it."""
    match failure.error:
        case UnknownModel():
            return "MODEL_NOT_FOUND"
        case InputTooLong():
            return "INPUT_TOO_LONG"
        case EngineClosed():
            return "MODEL_NOT_LOADED"
        case EngineError():
            return "INFERENCE_ERROR"
    if failure.status == 503:
        return "QUEUE_FULL"
    return "INVALID_INPUT" if failure.status < 500 else "INTERNAL_ERROR"


class Problem(TypedDict):
    """What went wrong."""

    code: str
    message: str


class Error(TypedDict):
    """An error in SIE's shape."""

    detail: Problem


class Dense(TypedDict):
    """The vector of an item; `dims` counts its numbers before they were packed."""

    dims: int
    dtype: Dtype
    values: Vector


class Sparse(TypedDict):
    """The entries of a sparse vector, by rising index."""

    dims: int | None
    dtype: Literal["float32", "float16"]
    indices: list[int]
    values: Vector


class MultiVector(TypedDict):
    """A vector per token."""

    token_dims: int
    num_tokens: int
    dtype: Dtype
    values: Matrix


class Encoded(TypedDict):
    """The vectors of an item, and what is said where it was cut."""

    id: NotRequired[str]
    dense: NotRequired[Dense]
    sparse: NotRequired[Sparse]
    multivector: NotRequired[MultiVector]
    truncated: NotRequired[bool]
    original_tokens: NotRequired[int]
    original_is_estimate: NotRequired[bool]
    chunks: NotRequired[int]


class Timing(TypedDict):
    """Milliseconds."""

    total_ms: float
    queue_ms: float
    tokenization_ms: float
    inference_ms: float


class Usage(TypedDict):
    """Tokens of the texts."""

    input_tokens: int


class EncodeReply(TypedDict):
    """The reply of /v1/encode/{model}."""

    model: str
    items: list[Encoded]
    timing: Timing
    usage: Usage


class ScoreEntry(TypedDict):
    """An item's place, from 0, and score."""

    item_id: str
    score: float
    rank: int


class ScoreReply(TypedDict):
    """The reply of /v1/score/{model}, best first."""

    model: str
    query_id: str | None
    scores: list[ScoreEntry]
    usage: Usage


_ERRORS = (Errors(Error, (*(status for status in STATUSES if status != 429), 406, 415)),)
CONTRACTS: Contracts = {
    "/v1/encode/{model}": Contract((EncodeReply,), _ERRORS, _MSGPACK),
    "/v1/score/{model}": Contract((ScoreReply,), _ERRORS, _MSGPACK),
}
