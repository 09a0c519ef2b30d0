"""vLLM's /pooling: the rows of any task, or of several from one pass, or what a plugin makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest
from poolhouse.outputs import Array
from poolhouse.server import encoding, replies
from poolhouse.server.dialects import plugin, vectors
from poolhouse.server.dialects.fields import Many, body_schema
from poolhouse.server.dialects.routing import direct_router
from poolhouse.server.dialects.vectors import VectorFields
from poolhouse.server.serving import Engine, Serving
from poolhouse.tasks import Task, parse_task


class PoolingFields(VectorFields):
    """The body of POST /pooling."""

    task: str | None = Field(
        None, description="embed, token_embed, classify or token_classify, as the model has it; none takes its first."
    )
    tasks: Many[str] | None = Field(
        None, min_length=1, description="Several tasks, answered from one pass; then `data` is an object by task."
    )
    step_tag_id: int | None = Field(None, description="Process rewards: the token whose rows are wanted.")
    returned_token_ids: Many[int] | None = Field(None, description="Process rewards: the columns that are wanted.")
    data: Any = Field(None, description='The data of a plugin, with the task "plugin".')


def router(serving: Serving) -> APIRouter:
    routes = direct_router("pooling")

    @routes.post("/pooling", openapi_extra=body_schema(PoolingFields))
    async def pooling(http: Request) -> Response:
        """One row, or one row per token, for each input."""
        return await answer(serving, http, await serving.read(http, PoolingFields))

    return routes


async def answer(serving: Serving, http: Request, fields: PoolingFields) -> Response:
    """The reply to a body of /pooling."""
    engine = serving.engine(fields.model)
    if fields.task is not None and fields.tasks is not None:
        raise InvalidRequest("Give task or tasks, not both.", "tasks")
    params = fields.params(
        dimensions=fields.dimensions,
        step_tag_id=fields.step_tag_id,
        returned_token_ids=None if fields.returned_token_ids is None else tuple(fields.returned_token_ids),
    )
    if fields.task == "plugin":
        return await plugin.answer(serving, http, engine, fields.data, params, fields.request_id, fields.priority)
    if fields.tasks is not None:
        first, *further = [parse_task(word, engine.tasks) for word in dict.fromkeys(fields.tasks)]
        requests = fields.requests(serving, first, params)
        several = [replace(request, further=tuple(further)) for request in requests]
        return await _reply_of_several(serving, http, fields, engine, several)
    task = engine.tasks[0] if fields.task is None else parse_task(fields.task, engine.tasks)
    requests = fields.requests(serving, task, params)
    return await vectors.reply(serving, http, fields, engine, requests, vectors.Names("pooling", "pooling", "data"))


async def _reply_of_several(
    serving: Serving, http: Request, fields: PoolingFields, engine: Engine, requests: Sequence[EngineRequest]
) -> Response:
    """The arrays of each input by task."""
    tasks = (requests[0].task, *requests[0].further)
    encodings = {task: fields.how(engine, task) for task in tasks}
    if not encodings[tasks[0]].in_json:
        raise InvalidRequest(
            "Several tasks come as float or base64; bytes hold one.", "encoding_format", fields.encoding_format
        )
    answers = await serving.answers(http, engine, requests)
    head = replies.head("pooling", http, fields.request_id, engine.name)

    def render() -> bytes:
        by_task = {
            task: encoding.encode([vectors.shown(_array(answer, task, tasks), task, engine) for answer in answers], how)
            for task, how in encodings.items()
        }
        items = []
        for index, answer in enumerate(answers):
            data = {task: encoding.value(arrays[index], fields.encoding_format) for task, arrays in by_task.items()}
            shapes = {
                task: list(arrays[index].shape)
                for task, arrays in by_task.items()
                if encoding.shape(arrays[index], fields.encoding_format)
            }
            item = {"index": index, "object": "pooling", "data": data} | ({"shapes": shapes} if shapes else {})
            items.append(item | replies.cut(answer))
        return encoding.render(head, items, {"usage": replies.usage(answers)})

    return await replies.write(serving, render, answers)


def _array(answer: Answer, task: Task, tasks: Sequence[Task]) -> Array:
    return answer.array if task == tasks[0] else answer.further[task]
