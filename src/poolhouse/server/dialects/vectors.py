"""What /v1/embeddings and /pooling share: prompts in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request, Response
from pydantic import Field

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


async def reply(
    serving: Serving,
    http: Request,
    fields: VectorFields,
    engine: Engine,
    requests: Sequence[EngineRequest],
    *,
    prefix: str,
    kind: str,
    key: str,
) -> Response:
    """The answers as a list of objects of this kind, their arrays under `key`."""
    answers = await serving.answers(http, engine, requests)
    task = requests[0].task
    head = replies.head(prefix, http, fields.request_id, engine.name)

    def render() -> bytes:
        items = []
        for index, answer in enumerate(answers):
            array = shown(answer.array, task, engine)
            vector = {"index": index, "object": kind, key: encoding.vector(array, fields.encoding_format)}
            items.append(vector | encoding.shape(array, fields.encoding_format) | replies.cut(answer))
        return encoding.render(head, items, {"usage": replies.usage(answers)})

    return await replies.write(serving, render, answers)


def shown(array: Array, task: Task, engine: Engine) -> Array:
    """The array as callers see it: a number per token where `token_classify` weighs tokens, as vLLM writes them."""
    return array[:, 0] if task == "token_classify" and engine.token_weights else array
