"""What /v1/embeddings and /pooling share: prompts in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request, Response
from pydantic import Field

from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.outputs import Array
from poolhouse.server import encoding, replies
from poolhouse.server.dialects.fields import Inputs
from poolhouse.server.serving import Engine, Serving
from poolhouse.tasks import Task


class VectorFields(Inputs):
    """Prompts, and how their vectors are wanted."""

    encoding_format: encoding.EncodingFormat = "float"
    dimensions: int | None = Field(None, description="Length of the vectors, for Matryoshka models.")


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
    engine: Engine,
    requests: Sequence[EngineRequest],
    names: Names,
) -> Response:
    """The answers to requests of one task, as a list of objects."""
    answers = await serving.answers(http, engine, requests)
    return await write(serving, http, fields, engine, requests[0].task, answers, names)


async def write(
    serving: Serving,
    http: Request,
    fields: VectorFields,
    engine: Engine,
    task: Task,
    answers: Sequence[Answer],
    names: Names,
    *,
    usage_of: Sequence[Answer] | None = None,
) -> Response:
    """Answers as a list of objects. usage_of: what tokens are counted of, where not of these answers."""
    head = replies.head(names.prefix, http, fields.request_id, engine.name)

    def render() -> bytes:
        items = []
        for index, answer in enumerate(answers):
            array = shown(answer.array, task, engine)
            item = {"index": index, "object": names.kind, names.key: encoding.vector(array, fields.encoding_format)}
            items.append(item | encoding.shape(array, fields.encoding_format) | replies.cut(answer))
        return encoding.render(head, items, {"usage": replies.usage(usage_of or answers)})

    return await replies.write(serving, render, answers)


def shown(array: Array, task: Task, engine: Engine) -> Array:
    """The array as callers see it: a number per token where `token_classify` weighs tokens, as vLLM writes them."""
    return array[:, 0] if task == "token_classify" and engine.token_weights else array
