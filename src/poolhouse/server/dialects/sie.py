"""SIE: encode, score and extract of Superlinked's inference engine; the path names the model, in JSON or msgpack.

Bodies and replies are msgpack with numpy arrays where Content-Type and Accept say so, as its SDK always does.
Source: sie_server 0.10.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal, NotRequired

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import EngineClosed, EngineError, InputTooLong, InvalidRequest, UnknownModel
from poolhouse.inputs.content import Content, Image, TextOrContent
from poolhouse.outputs import Array, SparseVector
from poolhouse.params import PoolingParams
from poolhouse.plans import scoring, sparse
from poolhouse.server.call import Call, JsonObject
from poolhouse.server.dialects import _hosted, _replies, extract
from poolhouse.server.dialects._fields import Items, Many, Strict
from poolhouse.server.dialects._hosted import EmbedOptions
from poolhouse.server.dialects._pairs import Pairs, Scored, score
from poolhouse.server.dialects.extract import LABELS_SCHEMA, Part
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.body import read_bytes, read_json
from poolhouse.server.wire.contract import STATUSES, Cut, Errors, Matrix, Vector
from poolhouse.server.wire.encoding import Numbers, dumps
from poolhouse.server.wire.errors import Failure, Refused, as_json
from poolhouse.settings import ServerSettings
from poolhouse.tasks import Task

Output = Literal["dense", "sparse", "multivector"]
Dtype = Literal["float32", "float16", "int8", "uint8", "binary"]
_TASKS: dict[Output, Task] = {"dense": "embed", "multivector": "token_embed"}
# What `score_mode` is called here, and how hybrid weighs dense, sparse and colbert.
_MODES = {"dense": "dense", "sparse": "sparse", "colbert": "colbert", "hybrid": "weighted"}
_HYBRID = (0.4, 0.2, 0.4)
_MSGPACK = ("application/msgpack", "application/x-msgpack")
_OVERFLOW = {
    "default": PoolingParams(),
    "truncate_text": PoolingParams(truncate_prompt_tokens=-1),
    "error": PoolingParams(overflow="error"),
}
_OTHER_MEDIA = ("audio", "video", "document")


class ImageInput(Strict):
    """A picture."""

    data: str | bytes = Field(description="Base64 in JSON, bytes in msgpack.")


class Item(Strict):
    """A text, pictures, or both, and what the reply calls it."""

    id: str | None = None
    text: str | None = None
    images: Many[ImageInput] | None = None
    audio: object = Field(None, description="Refused, as video and document.")
    video: object = None
    document: object = None

    def content(self, path: str) -> TextOrContent:
        """What it holds, pictures first. path: where the item stands in the body.

        Raises:
            InvalidRequest: neither a text nor a picture, or other media.
        """
        for name in _OTHER_MEDIA:
            if getattr(self, name):
                raise InvalidRequest(f"{path} has {name}; texts and pictures are read here.", f"{path}.{name}")
        if self.images:
            pictures = (_picture(image.data, f"{path}.images[{index}]") for index, image in enumerate(self.images))
            return _hosted.with_text(pictures, self.text)
        if self.text is None:
            raise InvalidRequest(f"{path} has neither text nor images.", f"{path}.text")
        return self.text


class EncodeOptions(Strict):
    """Options of a model; those of others are left to them."""

    is_query: bool = Field(False, description="Whether the texts are queries; else they are documents.")
    output_dtype: Dtype | None = None
    instruction: str | None = None


class EncodeParams(Strict):
    """Which vectors are wanted, and how."""

    output_types: Many[Output] | None = Field(None, description="Default: dense.")
    output_dtype: Dtype | None = Field(None, description="Default: float32. Of sparse vectors the first two alone.")
    instruction: str | None = Field(None, description="Refused: prompts are the checkpoint's own.")
    options: EncodeOptions | None = None


class EncodeFields(Strict):
    """The body of POST /v1/encode/{model}."""

    items: Items[Item] = Field(min_length=1)
    params: EncodeParams | None = None


class ScoreOptions(Strict):
    """Options of a model; those of others are left to them."""

    score_mode: Literal["dense", "sparse", "colbert", "hybrid"] | None = None
    score_weights: Many[float] | None = Field(None, description="Of hybrid: of dense, sparse and colbert.")
    instruction: str | None = None


class ScoreFields(Strict):
    """The body of POST /v1/score/{model}."""

    query: Item
    items: Items[Item] = Field(min_length=1)
    instruction: str | None = Field(None, description="What makes an item fit, for models that read one.")
    options: ScoreOptions | None = None


class ExtractOptions(Strict):
    """Options of a model; those of others are left to them."""

    threshold: float = Field(0.5, ge=0, le=1)
    flat_ner: bool = True
    multi_label: bool = False
    overflow_policy: Literal["default", "truncate_text", "error"] = "default"


class ExtractParams(Strict):
    """What is looked for, and how."""

    labels: Any = Field(description="Names of what to look for.", json_schema_extra=LABELS_SCHEMA)
    output_schema: object = Field(None, description="Refused: labels say what is looked for.")
    instruction: str | None = Field(None, description="Refused, as output_schema.")
    options: ExtractOptions | None = None


class ExtractFields(Strict):
    """The body of POST /v1/extract/{model}."""

    items: Items[Item] = Field(min_length=1)
    params: ExtractParams


async def encode(call: Call, body: JsonObject) -> Response:
    """Dense, sparse and token vectors of each item, from one pass."""
    fields = call.parse(body, EncodeFields)
    write = _writer(call.http)
    engine = await call.use(call.path_params["model"])
    params = fields.params or EncodeParams()
    options = params.options or EncodeOptions()
    if params.instruction or options.instruction:
        raise InvalidRequest(
            "instruction cannot be given here: the checkpoint's prompts hold, by options.is_query.",
            "params.instruction",
        )
    contents = _contents_of(fields.items)
    outputs: list[Output] = list(dict.fromkeys(params.output_types or ["dense"]))
    sparse_plan = sparse.plan(engine, (), sparse.SparseOptions()) if "sparse" in outputs else None
    tasks = {
        output: _TASKS[output] if sparse_plan is None or output != "sparse" else sparse_plan.head.task
        for output in outputs
    }
    first, *further = dict.fromkeys(tasks.values())
    read_as = EmbedOptions("query" if options.is_query else "document")
    requests = [
        replace(request, further=tuple(further))
        for request in _hosted.requests(call, contents, read_as, first, "items")
    ]
    answers = await call.answers(requests, "items[{}]".format)
    dtype: Dtype = params.output_dtype or options.output_dtype or "float32"

    def vectors(answer: Answer) -> dict[str, object]:
        arrays = {first: answer.array, **answer.further}
        by_output: dict[str, object] = {}
        for output, task in tasks.items():
            array = arrays[task]
            if output == "dense":
                by_output["dense"] = {"dims": len(array), "dtype": dtype, "values": quantized(array, dtype)}
            elif output == "multivector":
                size = {"token_dims": array.shape[1], "num_tokens": len(array)}
                by_output["multivector"] = {**size, "dtype": dtype, "values": quantized(array, dtype)}
            elif sparse_plan is not None:
                vector = sparse_plan.each(replace(answer, array=array)).vector
                by_output["sparse"] = _sparse(vector, engine, array, dtype)
        return by_output

    def render() -> Response:
        items = [
            {**({} if item.id is None else {"id": item.id}), **vectors(answer), **_replies.cut(answer)}
            for item, answer in zip(fields.items, answers, strict=True)
        ]
        usage = {"input_tokens": _replies.tokens_of(answers)}
        timing = _timing(answers, call.started)
        return write({"model": engine.facts.name, "items": items, "timing": timing, "usage": usage})

    return await call.write(render, answers)


async def score_items(call: Call, body: JsonObject) -> Response:
    """Items by how well they answer a query, best first."""
    fields = call.parse(body, ScoreFields)
    write = _writer(call.http)
    engine = await call.use(call.path_params["model"])
    options = fields.options or ScoreOptions()
    mode = None if options.score_mode is None else _MODES[options.score_mode]
    weights = None if options.score_weights is None else tuple(options.score_weights)
    if mode == "weighted":
        weights = weights or _HYBRID
    elif weights is not None:
        raise InvalidRequest("score_weights are for score_mode hybrid.", "options.score_weights")
    documents = _contents_of(fields.items)
    pairs = Pairs([fields.query.content("query")], documents, ("query", "items"))
    instruction = fields.instruction or options.instruction or None
    params = PoolingParams(truncate_prompt_tokens=-1)
    scored = await score(call, pairs, scoring.ScoreOptions(params, instruction, mode=mode, weights=weights))
    reply: ScoreReply = {
        "model": engine.facts.name,
        "query_id": fields.query.id,
        "scores": _ranking(fields.items, scored),
        "usage": {"input_tokens": _replies.tokens_of(scored.answers)},
    }
    return await call.write(lambda: write(reply), scored.answers)


async def extract_items(call: Call, body: JsonObject) -> Response:
    """The parts of each item that fit one of the labels; an item that cannot be read has its error."""
    fields = call.parse(body, ExtractFields)
    write = _writer(call.http)
    engine = await call.use(call.path_params["model"])
    params = fields.params
    for name in ("output_schema", "instruction"):
        if getattr(params, name):
            raise InvalidRequest(f"{name} cannot be given here: labels say what is looked for.", f"params.{name}")
    options = params.options or ExtractOptions()
    texts = [_text_of(item, f"items[{index}]") for index, item in enumerate(fields.items)]
    wanted = extract.Wanted(
        params.labels, options.threshold, options.flat_ner, options.multi_label, _OVERFLOW[options.overflow_policy]
    )
    found = await extract.find(call, texts, wanted, "items")
    reply = {
        "model": engine.facts.name,
        "items": [
            _extracted(item.id, entities, cut)
            for item, entities, cut in zip(fields.items, found.items, found.cuts, strict=True)
        ],
        "usage": {"input_tokens": _replies.tokens_of(found.answers)},
    }
    return await call.write(lambda: write(reply), found.answers)


def _text_of(item: Item, path: str) -> str:
    content = item.content(path)
    if isinstance(content, str):
        return content
    raise InvalidRequest(f"{path} has images; labels are looked for in texts.", f"{path}.images")


def _extracted(
    name: str | None, found: Sequence[Part] | InvalidRequest, cut: dict[str, bool | int]
) -> dict[str, object]:
    """An item with its parts, or with what is wrong with it."""
    named: dict[str, object] = {} if name is None else {"id": name}
    if isinstance(found, InvalidRequest):
        code = "INPUT_TOO_LONG" if isinstance(found, InputTooLong) else "INVALID_INPUT"
        return {**named, "entities": [], "error": {"code": code, "message": str(found)}}
    return {**named, "entities": found, **cut}


def _contents_of(items: Sequence[Item]) -> list[TextOrContent]:
    return [item.content(f"items[{index}]") for index, item in enumerate(items)]


def _picture(data: str | bytes, path: str) -> Content:
    return Content((Image(data, path),)) if isinstance(data, bytes) else _hosted.picture(data, path)


def _ranking(items: Sequence[Item], scored: Scored) -> list[ScoreEntry]:
    """The items, best first; one without an id is called by its index."""
    ranking: list[ScoreEntry] = []
    for rank, (index, value) in enumerate(scored.best()):
        name = items[index].id
        ranking.append({"item_id": f"item-{index}" if name is None else name, "score": value, "rank": rank})
    return ranking


async def _read(http: Request, settings: ServerSettings) -> dict[str, object]:
    """The body, of JSON or msgpack."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _MSGPACK:
        return await read_json(http, settings)
    raw = await read_bytes(http, settings)
    try:
        body = _msgpack(415).unpackb(raw, raw=False)
    except (ValueError, RecursionError) as error:
        raise Refused(f"The body is not valid msgpack: {error or type(error).__name__}", parameter="body") from None
    if not isinstance(body, dict):
        raise Refused("The body must be a map.", parameter="body")
    return body


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


def _sparse(vector: SparseVector, engine: PoolingEngine, array: Array, dtype: Dtype) -> dict[str, object]:
    kept: Dtype = "float16" if dtype == "float16" else "float32"
    of_vocabulary = engine.facts.sparse is not None and engine.facts.sparse.unit != "token"
    return {
        "dims": len(array) if of_vocabulary else None,
        "dtype": kept,
        "indices": vector.ids,
        "values": quantized(vector.weights, kept),
    }


def _timing(answers: Sequence[Answer], started: float) -> Timing:
    """Milliseconds: of the whole, and the longest that an item took in each part."""
    timings = [answer.timing for answer in answers]
    return {
        "total_ms": 1000 * (time.perf_counter() - started),
        "queue_ms": 1000 * max(timing.queue_seconds for timing in timings),
        "tokenization_ms": 1000 * max(timing.tokenize_seconds for timing in timings),
        "inference_ms": 1000 * max(timing.run_seconds for timing in timings),
    }


def _writer(http: Request) -> Callable[[object], Response]:
    """How the reply is written: JSON, unless the client asks for msgpack."""
    kind = next((kind for kind in _MSGPACK if kind in http.headers.get("accept", "").lower()), None)
    if kind is None:
        return lambda body: Response(dumps(body), media_type="application/json")
    pack = _msgpack(406).packb
    return lambda body: Response(pack(body, default=_as_map), media_type=kind)


def _msgpack(status: int) -> ModuleType:
    """The library that reads and writes msgpack.

    Raises:
        Refused: it is not installed; with that status.
    """
    try:
        import msgpack
    except ImportError:
        message = "msgpack is not installed here (pip install 'poolhouse[msgpack]'); send and accept application/json."
        raise Refused(message, status) from None
    return msgpack


def _as_map(value: object) -> dict[bytes, object]:
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
    """SIE's name for it."""
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


class Encoded(Cut):
    """The vectors of an item, and what was cut of it."""

    id: NotRequired[str]
    dense: NotRequired[Dense]
    sparse: NotRequired[Sparse]
    multivector: NotRequired[MultiVector]


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


class Extracted(Cut):
    """What was found in an item, and what was cut of it; or why it was not read."""

    id: NotRequired[str]
    entities: list[Part]
    error: NotRequired[Problem]


class ExtractReply(TypedDict):
    """The reply of /v1/extract/{model}."""

    model: str
    items: list[Extracted]
    usage: Usage


class ScoreEntry(TypedDict):
    """An item's rank, from 0, and score."""

    item_id: str
    score: float
    rank: int


class ScoreReply(TypedDict):
    """The reply of /v1/score/{model}, best first."""

    model: str
    query_id: str | None
    scores: list[ScoreEntry]
    usage: Usage


ERRORS = (Errors(Error, (*(status for status in STATUSES if status != 429), 406)),)
DIALECT = Dialect(
    "sie",
    (
        Route("POST", "/v1/encode/{model:path}", encode, (EncodeFields,), (EncodeReply,), media=_MSGPACK, read=_read),
        Route("POST", "/v1/score/{model:path}", score_items, (ScoreFields,), (ScoreReply,), media=_MSGPACK, read=_read),
        Route(
            "POST",
            "/v1/extract/{model:path}",
            extract_items,
            (ExtractFields,),
            (ExtractReply,),
            media=_MSGPACK,
            read=_read,
        ),
    ),
    shape,
    ERRORS,
    # /v1/score itself is vLLM's, and /v1/extract our own.
    owns=("/v1/encode", "/v1/score/", "/v1/extract/"),
)
