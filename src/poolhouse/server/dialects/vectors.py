"""What /v1/embeddings and /pooling share: prompts in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastapi import Request, Response
from pydantic import Field

from poolhouse.engine.request import Answer
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
    task: Task,
    *,
    prefix: str,
    kind: str,
    key: str,
) -> Response:
    """Answers of `task` as a list of objects of this kind, their arrays under `key`."""
    requests = fields.requests(serving, engine, task, fields.params(dimensions=fields.dimensions))
    answers = await serving.answers(http, engine, requests)
    if task == "token_classify" and engine.token_weights:
        # A number per token, as vLLM writes them, not a row of one number.
        answers = [replace(answer, array=answer.array[:, 0]) for answer in answers]
    head = replies.head(prefix, http, fields.request_id, engine.name)
    return await replies.write(serving, lambda: _render(head, answers, fields.encoding_format, kind, key), answers)


def _render(
    head: dict[str, object], answers: Sequence[Answer], form: encoding.EncodingFormat, kind: str, key: str
) -> bytes:
    items = [
        {"index": index, "object": kind, key: encoding.vector(answer.array, form)}
        | encoding.shape(answer.array, form)
        | replies.cut(answer)
        for index, answer in enumerate(answers)
    ]
    return encoding.render(head, items, {"usage": replies.usage(answers)})
