"""OpenAI: /v1/embeddings, with fields of other APIs; fields and replies of all routes with vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, Field, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, shown
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import Prompt, role_of
from poolhouse.outputs import Array
from poolhouse.params import LateChunkingParams, PoolingParams
from poolhouse.plans.late_chunking import Chunking, fixed_chunks, plan
from poolhouse.server.call import Call
from poolhouse.server.dialects import _hosted, _replies
from poolhouse.server.dialects._fields import Inputs, Nested
from poolhouse.server.engines import Engines
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire import encoding
from poolhouse.server.wire.contract import Cut, Matrix, Vector
from poolhouse.tasks import Task, parse_task
from poolhouse.vectors.muvera import Muvera
from poolhouse.vectors.precision import Precision

# Between the inputs, which are sentences or paragraphs of one text.
_JOINT = " "
# Numbers of the encodings of one reply: 256 MiB in float32.
_MAX_ENCODED = 2**26


class LateChunkingFields(Nested):
    """vLLM's fixed chunks of a text, special tokens included."""

    model_config = ConfigDict(extra="forbid", strict=True)

    chunk_size: int = Field(ge=1, lt=2**63, description="Tokens of a chunk.")


class MuveraFields(Nested):
    """How the vectors of a text's tokens become one vector; see `poolhouse.vectors.muvera.Muvera`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    k_sim: int = Field(5, description="Planes of a repetition, which make 2**k_sim parts.")
    repetitions: int = Field(20, description="Draws of planes.")
    projection: int | None = Field(16, description="Numbers of a part; 0 takes the vectors as they are.")
    dimension: int | None = Field(None, description="Length of the vector, by a count sketch; none leaves all numbers.")
    fill: bool = Field(True, description="Whether a part without a vector of a document takes the nearest.")
    seed: int = Field(42, description="What all draws follow from.")

    @property
    def config(self) -> Muvera:
        """Raises InvalidRequest for a number that cannot be."""
        return Muvera.of(self.model_dump() | {"projection": self.projection or None})


class VectorFields(Inputs):
    """Prompts, and the form of their vectors."""

    encoding_format: encoding.EncodingFormat = Field(
        "float", description="Numbers, base64, or a body of nothing but bytes, described in the header or not at all."
    )
    embed_dtype: Precision = Field(
        "float32", description="Numbers of base64 and bytes; int8, uint8, binary and ubinary hold in JSON too."
    )
    endianness: encoding.Endianness = Field(
        "native", description="Byte order of base64 and bytes; native is the server's."
    )
    dimensions: int | None = Field(None, description="Length of the vectors, for Matryoshka models.")
    late_chunking_params: LateChunkingFields | None = Field(
        None,
        description="Of token_embed: a vector per chunk, the mean of its tokens after one pass over the whole text.",
    )
    muvera: MuveraFields | None = Field(
        None,
        description="Of models with token_embed: one vector of those of a text's tokens, whose product with that of a query "
        "comes near to their MaxSim; input_type says which texts are queries.",
    )

    def params(self, **more: Any) -> PoolingParams:
        """How to cut and pool; more: fields that one route has beside the common ones."""
        chunking = (
            None if self.late_chunking_params is None else LateChunkingParams(self.late_chunking_params.chunk_size)
        )
        return super().params(dimensions=self.dimensions, late_chunking_params=chunking, **more)

    def encoding_of(self, task: Task, engine: PoolingEngine) -> encoding.Encoding:
        """How the arrays of that task are written.

        Raises:
            InvalidRequest: a precision that its answers cannot have.
        """
        return encoding.Encoding.of(
            self.encoding_format, self.embed_dtype, self.endianness, task, engine.facts.tasks, engine.facts.calibration
        )


class EmbeddingFields(VectorFields):
    """The body of POST /v1/embeddings; fields of Jina's, Voyage's and NVIDIA's APIs mean what they mean there."""

    task: str | None = Field(
        None,
        description='A task adapter of the checkpoint ("retrieval.query"), with the prompt stored under its name; '
        "where no adapters were named at start, as input_type.",
    )

    late_chunking: bool = Field(
        False, description="The inputs are the chunks of one text, each read with the text around it."
    )
    modality: Literal["text", "image"] = Field(
        "text", description="What the inputs are; pictures are URLs, data URIs or base64."
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_other_names(cls, body: object) -> object:
        return with_our_names(body) if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _refuse_two_adapters(self) -> EmbeddingFields:
        if self._names_a_use and self.adapter is not None:
            raise ValueError("adapter and task both choose an adapter; give one of them.")
        return self

    def prompts(self, engines: Engines) -> list[Prompt]:
        """As of every body, and pictures in the form of Jina, {image}, and of Infinity and NVIDIA, by `modality`."""
        engines.check_list(self.input, "input")
        items = self.input if isinstance(self.input, list) else [self.input]
        of_jina = any(type(item) is dict and "image" in item for item in items)
        if self.messages is not None or not (of_jina or self.modality == "image"):
            return super().prompts(engines)
        read = _hosted.pictures if self.modality == "image" else _hosted.contents_of
        return [Prompt.of(content) for content in read(engines, items, "input")]

    @property
    def _names_a_use(self) -> bool:
        # Clients that name a pooling task here mean that.
        return self.task not in (None, "embed", "token_embed")

    def pooling_task(self, engine: PoolingEngine) -> Task:
        """A vector per input, or one per token or chunk: the task of the fields, else the first task of the model.

        Raises:
            UnsupportedTask: it has neither.
        """
        of_tokens = self.late_chunking_params is not None or self.muvera is not None
        task: Task = "token_embed" if of_tokens else "embed"
        if self.task in ("embed", "token_embed"):
            task = parse_task(self.task, ("embed", "token_embed"))
        elif engine.facts.tasks[0] == "token_embed":
            task = "token_embed"
        if task not in engine.facts.tasks:
            raise UnsupportedTask("The model does not support Embeddings API", "model", engine.facts.name)
        return task

    def apply_task(self, engine: PoolingEngine) -> None:
        """Take `task` for an adapter where adapters were named at start, else for an input type."""
        if self._names_a_use and engine.facts.adapters:
            self.adapter = self.task
        elif self._names_a_use and self.input_type is None:
            self.input_type = self.task


async def embeddings(call: Call, fields: EmbeddingFields) -> Response:
    """One vector per input."""
    engine = await call.use(fields.model)
    task = fields.pooling_task(engine)
    fields.apply_task(engine)
    requests = fields.requests(call.engines, task, fields.params())
    names = Names("embd", "embedding", "embedding")
    if not fields.late_chunking:
        return await reply(call, fields, requests, names)
    if task != "embed" or fields.muvera is not None:
        raise InvalidRequest("late_chunking gives a vector per input; it is for the task embed.", "late_chunking")
    chunked = await read(call, requests)
    how = fields.encoding_of("embed", engine)
    return await write(call, fields, [chunked.whole], chunked.chunks, names, how)


@dataclass(frozen=True, slots=True)
class Names:
    """How a route names its ids, its objects, and the field that holds an array."""

    prefix: str
    kind: str
    key: str


async def reply(call: Call, fields: VectorFields, requests: Sequence[EngineRequest], names: Names) -> Response:
    """The answers to requests of one task, as a list of objects or as bytes alone."""
    engine, task = call.engine, requests[0].task
    if fields.muvera is not None:
        return await _encoded(call, fields, fields.muvera.config, requests, names)
    how = fields.encoding_of(task, engine)
    answers = await call.answers(requests)
    arrays = [shown(answer.array, task, engine.facts.token_weights) for answer in answers]
    chunking = requests[0].params.late_chunking_params
    if chunking is None:
        return await write(call, fields, answers, arrays, names, how)
    chunks = [{"late_chunking": fixed_chunks(chunking, answer.tokens)} for answer in answers]
    return await write(call, fields, answers, arrays, names, how, chunks)


async def _encoded(
    call: Call, fields: VectorFields, muvera: Muvera, requests: Sequence[EngineRequest], names: Names
) -> Response:
    """An encoding of the token vectors of each input.

    Raises:
        InvalidRequest: another task; chunks; a length or precision that encodings cannot have; more than a reply holds.
    """
    engine = call.engine
    if requests[0].task != "token_embed":
        raise InvalidRequest("muvera belongs to the task 'token_embed'.", "muvera")
    if fields.late_chunking_params is not None:
        raise InvalidRequest("muvera makes one vector of a text, late_chunking_params one per chunk.", "muvera")
    muvera.checked(fields.embed_dtype, "embed_dtype")
    length = muvera.length(fields.dimensions or engine.facts.widths["token_embed"])
    if len(requests) * length > _MAX_ENCODED:
        raise InvalidRequest(
            f"muvera: {len(requests)} vectors of {length} numbers are more than {_MAX_ENCODED}; send fewer inputs.",
            "muvera",
        )
    how = encoding.Encoding(fields.encoding_format, fields.embed_dtype, fields.endianness)
    answers = await call.answers(requests)
    arrays, queries = [answer.array for answer in answers], role_of(fields.input_type) == "query"
    encodings = await asyncio.to_thread(partial(muvera.encode, arrays, queries=queries))
    return await write(call, fields, answers, list(encodings), names, how)


async def write(
    call: Call,
    fields: VectorFields,
    answers: Sequence[Answer],
    arrays: Sequence[Array],
    names: Names,
    how: encoding.Encoding,
    more: Sequence[Mapping[str, object]] | None = None,
) -> Response:
    """Arrays as a list of objects or as bytes alone.

    answers: one for each array; where there are fewer, only their tokens are counted.
    more: further fields of each object; None: what was cut of its input.
    """
    head = call.list_head(names.prefix, fields.request_id)
    further = _replies.cuts(answers, len(arrays)) if more is None else more

    def render() -> bytes | Response:
        encoded = encoding.encode(arrays, how)
        if not how.in_json:
            body, headers = encoding.octets(encoded, head, _replies.tokens_of(answers), how)
            return Response(body, media_type="application/octet-stream", headers=headers)
        items = [
            {
                "index": index,
                "object": names.kind,
                names.key: encoding.value(array, how.form),
                **encoding.shape(array, how.form),
                **one,
            }
            for index, (array, one) in enumerate(zip(encoded, further, strict=True))
        ]
        return encoding.render(head, items, {"usage": _replies.usage(answers)})

    return await call.write(render, answers)


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A text that was read as a whole.

    chunks: the vector of each, in order. whole: the text's tokens, as an answer, for counting.
    """

    chunks: list[Array]
    whole: Answer


async def read(call: Call, requests: Sequence[EngineRequest]) -> Read:
    """The vectors of texts that follow each other, each of which knows the texts around it.

    requests: of the task embed, alike but for their texts.

    Raises:
        InvalidRequest: token ids, or a text without a token.
    """
    texts = [request.prompt.text for request in requests if request.prompt.text]
    if len(texts) != len(requests):
        raise InvalidRequest("late_chunking takes texts that are not empty.", "input")
    ends = [end - len(_JOINT) for end in accumulate(len(text) + len(_JOINT) for text in texts)]
    spans = [(end - len(text), end) for text, end in zip(texts, ends, strict=True)]
    params = requests[0].params
    if params.truncate_prompt_tokens == -1:
        # What is longer than the model reads is read in windows; cut, the last chunks would have no token.
        params = replace(params, truncate_prompt_tokens=None)
    whole = replace(requests[0], prompt=Prompt(_JOINT.join(texts)), params=params)
    try:
        chunking = await asyncio.to_thread(plan, call.engine, [whole], Chunking(spans=[spans]))
    except InvalidRequest as error:
        raise type(error)(
            str(error), "input" if error.parameter == "chunks" else error.parameter, error.value
        ) from None
    if not chunking.requests:
        raise InvalidRequest("late_chunking takes texts that are more than white space.", "input")
    windows = [replace(window, adapter=whole.adapter, priority=whole.priority) for window in chunking.requests]
    answers = await call.answers(windows)
    (chunked,) = chunking.finish(answers)
    return Read([chunk.array for chunk in chunked.chunks], replace(answers[0], tokens=chunked.tokens))


_RENAMED = {"output_dimension": "dimensions", "normalized": "use_activation"}
# The precision of a vector: Jina's embedding_type, Voyage's output_dtype, NVIDIA's embedding_type.
_PRECISIONS = ("embedding_type", "output_dtype")
_CUTS: dict[object, dict[str, object]] = {
    True: {"truncate_prompt_tokens": -1},
    "END": {"truncate_prompt_tokens": -1, "truncation_side": "right"},
    "START": {"truncate_prompt_tokens": -1, "truncation_side": "left"},
    False: {},
    "NONE": {},
}


def with_our_names(body: dict[str, object]) -> dict[str, object]:
    """The body with our names for fields of other APIs; ours win where both are there, unknown values stay."""
    renamed: dict[str, object] = {}
    for theirs, ours in _RENAMED.items():
        if body.get(theirs) is not None:
            renamed[ours] = body[theirs]
    for name in _PRECISIONS:
        match body.get(name):
            case "base64":
                renamed["encoding_format"] = "base64"
            case "float":
                pass
            case str() as precision:
                renamed["embed_dtype"] = precision
    for name in ("truncate", "truncation"):
        cut = body.get(name)
        if isinstance(cut, str | bool) and cut in _CUTS:
            renamed |= _CUTS[cut]
    return {**body, **{name: value for name, value in renamed.items() if body.get(name) is None}} if renamed else body


class Usage(TypedDict):
    """Tokens of the inputs; `truncated` counts the inputs that were cut."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: None
    truncated: NotRequired[int]


class List(TypedDict):
    """The fields of every list of answers, except `data`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class LateChunk(TypedDict):
    """A part of a text: its first token and the one after its last, and so its characters; null where there are none."""

    token_range: tuple[int, int]
    char_range: tuple[int, int] | None


class LateChunking(TypedDict):
    """The chunks that the rows of a matrix belong to; input_tokens: of the whole text, special ones included."""

    chunk_size: int
    input_tokens: int
    chunks: list[LateChunk]
    strategy: Literal["fixed_tokens"]


class Embedding(Cut):
    """The vector of an input, or one per token or chunk: numbers, or their memory in base64, of a matrix with its shape."""

    index: int
    object: Literal["embedding"]
    embedding: Vector | Matrix | str
    shape: NotRequired[list[int]]
    late_chunking: NotRequired[LateChunking]


class EmbeddingReply(List):
    """The reply of /v1/embeddings."""

    data: list[Embedding]


BYTES = ("application/octet-stream",)
METADATA = {"metadata": "With encoding_format bytes: JSON that describes the arrays of the body."}
DIALECT = Dialect(
    "embeddings",
    (Route("POST", "/v1/embeddings", embeddings, EmbeddingFields, (EmbeddingReply,), media=BYTES, headers=METADATA),),
)
