"""What /v1/embeddings and /pooling share: prompts in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from pydantic import ConfigDict, Field

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, shown
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.outputs import Array
from poolhouse.params import LateChunkingParams, PoolingParams
from poolhouse.plans.late_chunking import fixed_chunks
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._fields import Inputs, Nested
from poolhouse.server.engines import Serving
from poolhouse.server.wire import encoding
from poolhouse.tasks import Task
from poolhouse.vectors.precision import Precision


class LateChunkingFields(Nested):
    """vLLM's fixed chunks of a text, special tokens included."""

    model_config = ConfigDict(extra="forbid", strict=True)

    chunk_size: int = Field(ge=1, lt=2**63, description="Tokens of a chunk.")


class VectorFields(Inputs):
    """Prompts, and how their vectors are wanted."""

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

    def params(self, **more: Any) -> PoolingParams:
        """How to cut and pool; more: fields that one route has beside the common ones."""
        chunking = (
            None if self.late_chunking_params is None else LateChunkingParams(self.late_chunking_params.chunk_size)
        )
        return super().params(dimensions=self.dimensions, late_chunking_params=chunking, **more)

    def how(self, engine: PoolingEngine, task: Task) -> encoding.Encoding:
        """How the arrays of that task are written.

        Raises:
            InvalidRequest: a precision that its answers cannot have.
        """
        return encoding.Encoding.of(
            self.encoding_format, self.embed_dtype, self.endianness, task, engine.facts.tasks, engine.facts.calibration
        )


@dataclass(frozen=True, slots=True)
class Names:
    """How a route names its ids, its objects, and the field that holds an array."""

    prefix: str
    kind: str
    key: str


async def reply(
    serving: Serving,
    http: Request,
    fields: VectorFields,
    engine: PoolingEngine,
    requests: Sequence[EngineRequest],
    names: Names,
) -> Response:
    """The answers to requests of one task, as a list of objects or as bytes alone."""
    how = fields.how(engine, requests[0].task)
    answers = await serving.answers(http, engine, requests)
    arrays = [shown(answer.array, requests[0].task, engine) for answer in answers]
    about: list[dict[str, Any]] | None = None
    chunking = requests[0].params.late_chunking_params
    if chunking is not None:
        about = [{"late_chunking": fixed_chunks(chunking, answer.tokens)} for answer in answers]
    return await write(serving, http, fields, engine, answers, arrays, names, how, about)


async def write(
    serving: Serving,
    http: Request,
    fields: VectorFields,
    engine: PoolingEngine,
    answers: Sequence[Answer],
    arrays: Sequence[Array],
    names: Names,
    how: encoding.Encoding,
    about: Sequence[dict[str, Any]] | None = None,
) -> Response:
    """Arrays as a list of objects or as bytes alone.

    answers: what they were made of, one for each; where there are fewer, only their tokens are counted.
    about: what is said beside each array; None: what was cut of its input.
    """
    head = _replies.head(names.prefix, http, fields.request_id, engine.facts.name)
    said = _replies.cuts(answers, len(arrays)) if about is None else about

    def render() -> bytes | Response:
        encoded = encoding.encode(arrays, how)
        usage = _replies.usage(answers)
        if not how.in_json:
            body, headers = encoding.octets(encoded, head, usage["prompt_tokens"], how)
            return Response(body, media_type="application/octet-stream", headers=headers)
        items = [
            {"index": index, "object": names.kind, names.key: encoding.value(array, how.form)}
            | encoding.shape(array, how.form)
            | beside
            for index, (array, beside) in enumerate(zip(encoded, said, strict=True))
        ]
        return encoding.render(head, items, {"usage": usage})

    return await _replies.write(serving, render, answers)
