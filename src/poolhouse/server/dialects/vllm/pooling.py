"""vLLM's /pooling: the rows of any task, or of several from one pass, sparse vectors, or what a plugin makes of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import Field, StrictInt, model_validator

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, pooling_outputs, shown
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import ConfigError, EngineError, InvalidRequest
from poolhouse.inputs.prompts import parse_prompts, role_of
from poolhouse.outputs import Array, SparseVector
from poolhouse.params import PoolingParams
from poolhouse.plans import sparse
from poolhouse.plugins import Plugin, params_of, prompts_of, task_of
from poolhouse.server.dialects import _replies, _vectors
from poolhouse.server.dialects._fields import Many, body_schema
from poolhouse.server.dialects._vectors import VectorFields
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire import encoding
from poolhouse.tasks import Task, parse_task
from poolhouse.vectors.token_pooling import check_factor, pooled

# The task of /pooling that is none of the engine's.
SPARSE: Final = "sparse"
Word = Task | Literal["sparse"]
_IN_JSON = ("float", "base64")


class PoolingFields(VectorFields):
    """The body of POST /pooling."""

    task: str | None = Field(
        None,
        description="embed, token_embed, classify, token_classify or sparse, as the model has it; none takes its first, "
        "or, with nothing but data, the plugin.",
    )
    tasks: Many[str] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="Several tasks, answered from one pass; then `data` is an object by task.",
    )
    top_k: int | None = Field(None, description="Sparse vectors: keep so many entries, the largest.")
    threshold: float | None = Field(None, description="Sparse vectors: leave out entries that weigh less.")
    token_pooling_factor: float | None = Field(
        None, ge=1, description="Of token_embed: about one vector per so many tokens, by clusters; for documents."
    )
    step_tag_id: int | None = Field(None, description="Process rewards: the token whose rows are wanted.")
    returned_token_ids: Many[StrictInt] | None = Field(
        None, description="Process rewards: the columns that are wanted."
    )
    data: Any = Field(None, description='The data of a plugin, with the task "plugin".')

    @model_validator(mode="after")
    def _data_is_for_the_plugin(self) -> PoolingFields:
        others = (self.task, self.tasks, self.input, self.messages)
        if self.data is not None and all(other is None for other in others):
            self.task = "plugin"
        return self

    def refuse_pruning(self) -> None:
        """Raise InvalidRequest where something is asked of sparse vectors, and none of them is."""
        for name in ("top_k", "threshold"):
            if getattr(self, name) is not None:
                raise InvalidRequest(f"{name} belongs to the task 'sparse'.", name, getattr(self, name))


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
        step_tag_id=fields.step_tag_id,
        returned_token_ids=None if fields.returned_token_ids is None else tuple(fields.returned_token_ids),
    )
    if fields.token_pooling_factor is not None:
        _check_token_pooling(fields, engine)
    if fields.task == "plugin":
        return await answer_plugin(serving, http, engine, fields.data, params, fields.request_id, fields.priority)
    if fields.task == SPARSE:
        return await _reply_of_sparse(serving, http, fields, engine, params)
    if fields.tasks is not None:
        return await _reply_of_several(serving, http, fields, engine, params)
    fields.refuse_pruning()
    task = engine.facts.tasks[0] if fields.task is None else parse_task(fields.task, engine.facts.tasks, (SPARSE,))
    requests = fields.requests(serving, task, params)
    names = _vectors.Names("pooling", "pooling", "data")
    if fields.token_pooling_factor is None:
        return await _vectors.reply(serving, http, fields, engine, requests, names)
    how = fields.how(engine, task)
    answers = await serving.answers(http, engine, requests)
    arrays = await asyncio.to_thread(_clustered, answers, fields.token_pooling_factor)
    return await _vectors.write(serving, http, fields, engine, answers, arrays, names, how)


def _check_token_pooling(fields: PoolingFields, engine: PoolingEngine) -> None:
    """Raise InvalidRequest where fewer token vectors are asked for, and token vectors alone are not."""
    word = fields.task or engine.facts.tasks[0]
    of_tokens = fields.tasks is None and word not in ("plugin", SPARSE)
    if not of_tokens or parse_task(word, engine.facts.tasks) != "token_embed":
        raise InvalidRequest("token_pooling_factor belongs to the task 'token_embed' alone.", "token_pooling_factor")
    if fields.late_chunking_params is not None:
        raise InvalidRequest("Vectors are pooled by clusters or by chunks, not both.", "token_pooling_factor")
    check_factor(fields.token_pooling_factor, role_of(fields.input_type))


def _clustered(answers: Sequence[Answer], factor: float) -> list[Array]:
    try:
        return [pooled(answer.array, factor) for answer in answers]
    except ConfigError as error:  # what finds the clusters is not installed here
        raise InvalidRequest(str(error), "token_pooling_factor") from None


async def _reply_of_sparse(
    serving: Serving, http: Request, fields: PoolingFields, engine: PoolingEngine, params: PoolingParams
) -> Response:
    """The sparse vector of each input: its entries, by rising id."""
    if fields.encoding_format not in _IN_JSON:
        raise InvalidRequest("Sparse vectors come as JSON.", "encoding_format", fields.encoding_format)
    weigh = sparse.plan(engine, (), sparse.Options(params, top_k=fields.top_k, threshold=fields.threshold))
    answers = await serving.answers(http, engine, fields.requests(serving, weigh.head.task, params))
    head = _replies.head("pooling", http, fields.request_id, engine.facts.name)

    def render() -> bytes:
        items = [
            {"index": index, "object": "pooling", "data": entries(weigh.each(answer).vector)} | _replies.cut(answer)
            for index, answer in enumerate(answers)
        ]
        return encoding.render(head, items, {"usage": _replies.usage(answers)})

    return await _replies.write(serving, render, answers)


async def _reply_of_several(
    serving: Serving, http: Request, fields: PoolingFields, engine: PoolingEngine, params: PoolingParams
) -> Response:
    """The arrays, or sparse vector, of each input by task."""
    if fields.encoding_format not in _IN_JSON:
        raise InvalidRequest(
            "Several tasks come as float or base64; bytes hold one.", "encoding_format", fields.encoding_format
        )
    words: list[Word] = [
        SPARSE if word == SPARSE else parse_task(word, engine.facts.tasks, (SPARSE,)) for word in fields.tasks or ()
    ]
    weigh = None
    if SPARSE in words:
        weigh = sparse.plan(engine, (), sparse.Options(top_k=fields.top_k, threshold=fields.threshold))
    else:
        fields.refuse_pruning()
    first, *further = _passes(words, weigh)
    encodings = {task: fields.how(engine, task) for task in (first, *further) if task in words}
    requests = fields.requests(serving, first, params)
    answers = await serving.answers(http, engine, [replace(request, further=tuple(further)) for request in requests])
    head = _replies.head("pooling", http, fields.request_id, engine.facts.name)

    def render() -> bytes:
        by_task = {
            task: encoding.encode([shown(_array(answer, task, first), task, engine) for answer in answers], how)
            for task, how in encodings.items()
        }
        items = []
        for index, answer in enumerate(answers):
            data: dict[Word, Any] = {
                task: encoding.value(arrays[index], fields.encoding_format) for task, arrays in by_task.items()
            }
            shapes = {
                task: list(arrays[index].shape)
                for task, arrays in by_task.items()
                if encoding.shape(arrays[index], fields.encoding_format)
            }
            if weigh is not None:
                weighed = replace(answer, array=_array(answer, weigh.head.task, first))
                data[SPARSE] = entries(weigh.each(weighed).vector)
            item = {"index": index, "object": "pooling", "data": data} | ({"shapes": shapes} if shapes else {})
            items.append(item | _replies.cut(answer))
        return encoding.render(head, items, {"usage": _replies.usage(answers)})

    return await _replies.write(serving, render, answers)


def entries(vector: SparseVector) -> list[dict[str, Any]]:
    """The entries of a sparse vector as JSON has them; features without names have a null token."""
    tokens = [None] * len(vector) if vector.names is None else vector.tokens
    # The weights stay numpy's, which are written as short as float32 allows.
    return [
        {"token_id": entry, "token": token, "weight": weight}
        for entry, token, weight in zip(vector.indices, tokens, vector.weights, strict=True)
    ]


def _passes(words: Sequence[Word], weigh: sparse.SparsePlan | None) -> list[Task]:
    """The engine's tasks behind these words, each once: sparse vectors are read from the answer of another.

    Raises:
        InvalidRequest: sparse vectors asked for twice; the engine refuses other repetitions.
    """
    tasks: list[Task] = [word for word in words if word != SPARSE]
    if weigh is None:
        return tasks
    if words.count(SPARSE) > 1:
        raise InvalidRequest(f"The task '{SPARSE}' is asked for twice; name each once.", "task", SPARSE)
    return tasks if weigh.head.task in tasks else [*tasks, weigh.head.task]


def _array(answer: Answer, task: Task, first: Task) -> Array:
    return answer.array if task == first else answer.further[task]


async def answer_plugin(
    serving: Serving,
    http: Request,
    engine: PoolingEngine,
    data: Any,
    params: PoolingParams,
    request_id: str | None,
    priority: int,
) -> Response:
    """What the plugin makes of the answers to the prompts that it made of `data`.

    Raises:
        UnsupportedTask: no plugin is installed. InvalidRequest: data that it does not understand. EngineError: output
            that is no JSON.
    """
    plugin = engine.facts.plugin
    if plugin is None:
        parse_task("plugin", engine.facts.tasks)  # says how one is installed
        raise AssertionError
    requests = await asyncio.to_thread(_requests, engine, plugin, data, params)
    serving.check_items(len(requests), "data")
    answers = await serving.answers(
        http, engine, [replace(request, priority=priority) for request in requests], "data: prompt {}".format
    )
    outputs = pooling_outputs(answers, task_of(plugin, engine.facts.tasks), engine)
    made = await asyncio.to_thread(plugin.post_process, outputs)
    body = {"request_id": _replies.reply_id("pooling", http, request_id), "created_at": int(time.time()), "data": made}
    return await _replies.write(serving, lambda: _json(body), answers)


def _requests(engine: PoolingEngine, plugin: Plugin, data: Any, params: PoolingParams) -> list[EngineRequest]:
    task = parse_task(task_of(plugin, engine.facts.tasks), engine.facts.tasks)
    merged = params_of(plugin, params)
    return [EngineRequest(prompt, task, merged) for prompt in parse_prompts(prompts_of(plugin, {"data": data}), "data")]


def _json(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        raise EngineError(f"The plugin's output cannot be written as JSON: {error}") from error
