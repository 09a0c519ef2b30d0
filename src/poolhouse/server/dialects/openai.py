"""OpenAI's embeddings, with the fields that vLLM added."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, NotRequired

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import Prompt
from poolhouse.outputs import Array
from poolhouse.plans.late_chunking import Chunking, plan
from poolhouse.server.dialects import _vectors
from poolhouse.server.dialects._fields import body_schema
from poolhouse.server.dialects._vectors import VectorFields
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.contract import Contract, Contracts, Cut, Matrix, Vector
from poolhouse.tasks import Task, parse_task


class EmbeddingFields(VectorFields):
    """The body of POST /v1/embeddings; fields of Jina's, Voyage's and NVIDIA's APIs mean what they mean there."""

    task: str | None = Field(
        None,
        description='A task adapter of the checkpoint ("retrieval.query"), with the prompt stored under its name; '
        "where no adapters were named at start, as input_type.",
    )

    late_chunking: bool = Field(
        False, description="The inputs are the chunks of one text, each read with what stands around it."
    )

    @model_validator(mode="before")
    @classmethod
    def _understand_other_apis(cls, body: Any) -> Any:
        return in_our_words(body) if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _refuse_two_adapters(self) -> EmbeddingFields:
        if self._names_a_use and self.adapter is not None:
            raise ValueError("adapter and task both choose an adapter; give one of them.")
        return self

    @property
    def _names_a_use(self) -> bool:
        # Clients that name a pooling task here mean that.
        return self.task not in (None, "embed", "token_embed")

    def pooling_task(self, engine: PoolingEngine) -> Task:
        """A vector per input, or one per token or chunk: as the fields ask, else as the model answers first.

        Raises:
            UnsupportedTask: it has neither.
        """
        asked: Task = "token_embed" if self.late_chunking_params is not None else "embed"
        if self.task in ("embed", "token_embed"):
            asked = parse_task(self.task, ("embed", "token_embed"))
        elif engine.facts.tasks[0] == "token_embed":
            asked = "token_embed"
        if asked not in engine.facts.tasks:
            raise UnsupportedTask("The model does not support Embeddings API", "model", engine.facts.name)
        return asked

    def apply_task(self, engine: PoolingEngine) -> None:
        """Make of `task` an adapter where adapters were named at start, else what an input type means."""
        if self._names_a_use and engine.facts.adapters:
            self.adapter = self.task
        elif self._names_a_use and self.input_type is None:
            self.input_type = self.task


def router(serving: Serving) -> APIRouter:
    routes = direct_router("embeddings")

    @routes.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingFields))
    async def embeddings(http: Request) -> Response:
        """One vector per input."""
        return await answer(serving, http, await serving.read(http, EmbeddingFields))

    return routes


async def answer(serving: Serving, http: Request, fields: EmbeddingFields) -> Response:
    """The reply to a body of /v1/embeddings."""
    engine = serving.engine(fields.model)
    task = fields.pooling_task(engine)
    fields.apply_task(engine)
    requests = fields.requests(serving, task, fields.params())
    names = _vectors.Names("embd", "embedding", "embedding")
    if fields.late_chunking:
        if task != "embed":
            raise InvalidRequest("late_chunking gives a vector per input; it is for the task embed.", "late_chunking")
        chunked = await read(serving, http, engine, requests)
        how = fields.how(engine, "embed")
        return await _vectors.write(serving, http, fields, engine, [chunked.whole], chunked.chunks, names, how)
    return await _vectors.reply(serving, http, fields, engine, requests, names)


class Usage(TypedDict):
    """Tokens of the inputs; `truncated` counts the inputs that were cut."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: None
    truncated: NotRequired[int]


class List(TypedDict):
    """What begins and ends a list of answers."""

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
    """What the rows of a matrix stand for; input_tokens: of the whole text, special ones included."""

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
CONTRACTS: Contracts = {"/v1/embeddings": Contract((EmbeddingReply,), media=BYTES, headers=METADATA)}
# Between the inputs, which are sentences or paragraphs of one text.
_JOINT = " "


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A text that was read as a whole.

    chunks: the vector of each, in order. whole: the text's tokens, as an answer, for counting.
    """

    chunks: list[Array]
    whole: Answer


async def read(serving: Serving, http: Request, engine: PoolingEngine, requests: Sequence[EngineRequest]) -> Read:
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
        made = await asyncio.to_thread(plan, engine, [whole], Chunking(spans=[spans]))
    except InvalidRequest as error:
        raise type(error)(
            str(error), "input" if error.parameter == "chunks" else error.parameter, error.value
        ) from None
    if not made.requests:
        raise InvalidRequest("late_chunking takes texts that are more than white space.", "input")
    windows = [replace(window, adapter=whole.adapter, priority=whole.priority) for window in made.requests]
    answers = await serving.answers(http, engine, windows)
    (chunked,) = made.finish(answers)
    return Read([chunk.array for chunk in chunked.chunks], replace(answers[0], tokens=chunked.tokens))


_RENAMED = {"output_dimension": "dimensions", "normalized": "use_activation"}
# Words for the numbers of a vector: Jina's embedding_type, Voyage's output_dtype, NVIDIA's embedding_type.
_PRECISIONS = ("embedding_type", "output_dtype")
_CUTS: dict[Any, dict[str, Any]] = {
    True: {"truncate_prompt_tokens": -1},
    "END": {"truncate_prompt_tokens": -1, "truncation_side": "right"},
    "START": {"truncate_prompt_tokens": -1, "truncation_side": "left"},
    False: {},
    "NONE": {},
}


def in_our_words(body: dict[str, Any]) -> dict[str, Any]:
    """The body with those fields replaced; ours win where both are given. What has no such word is left as it is."""
    made: dict[str, Any] = {}
    for theirs, ours in _RENAMED.items():
        if body.get(theirs) is not None:
            made[ours] = body[theirs]
    for name in _PRECISIONS:
        match body.get(name):
            case "base64":
                made["encoding_format"] = "base64"
            case "float":
                pass
            case str() as precision:
                made["embed_dtype"] = precision
    for name in ("truncate", "truncation"):
        cut = body.get(name)
        if isinstance(cut, str | bool) and cut in _CUTS:
            made |= _CUTS[cut]
    return {**body, **{name: value for name, value in made.items() if body.get(name) is None}} if made else body
