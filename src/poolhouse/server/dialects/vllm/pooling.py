"""Pooling: vLLM's /pooling; answers of any task, of several in one pass, sparse vectors, output of a plugin."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NotRequired

import numpy as np
import orjson
from pydantic import Field, StrictInt, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, pooling_outputs, shown
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import ConfigError, EngineError, InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import parse_prompts, role_of
from poolhouse.outputs import Array, SparseVector
from poolhouse.params import PoolingParams
from poolhouse.plans import several, sparse
from poolhouse.plans.several import SPARSE, TaskOrSparse
from poolhouse.plugins import Plugin, params_of, prompts_of, task_of
from poolhouse.server.call import Call
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._fields import Many
from poolhouse.server.dialects.openai import BYTES, METADATA, LateChunking, List, Names, VectorFields, reply, write
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire import encoding
from poolhouse.server.wire.contract import Cut, Matrix, Vector
from poolhouse.tasks import TOKEN_TASKS, parse_task
from poolhouse.vectors.token_pooling import check_factor, pooled

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
    return_tokens: bool = Field(
        False, description="Of token_embed and token_classify: what each row stands for, in `tokens` of an answer."
    )
    step_tag_id: int | None = Field(None, description="Process rewards: the token whose rows are wanted.")
    returned_token_ids: Many[StrictInt] | None = Field(
        None, description="Process rewards: the columns that are wanted."
    )
    data: object = Field(None, description='The data of a plugin, with the task "plugin".')

    @model_validator(mode="after")
    def _data_is_for_the_plugin(self) -> PoolingFields:
        others = (self.task, self.tasks, self.input, self.messages)
        if self.data is not None and all(other is None for other in others):
            self.task = "plugin"
        return self

    def refuse_pruning(self) -> None:
        """Raise InvalidRequest for options of sparse vectors, where no sparse vectors are requested."""
        for name in ("top_k", "threshold"):
            if getattr(self, name) is not None:
                raise InvalidRequest(f"{name} belongs to the task 'sparse'.", name, getattr(self, name))


async def pooling(call: Call, fields: PoolingFields) -> Response:
    """One row, or one row per token, for each input."""
    engine = await call.use(fields.model)
    if fields.task is not None and fields.tasks is not None:
        raise InvalidRequest("Give task or tasks, not both.", "tasks")
    params = fields.params(
        step_tag_id=fields.step_tag_id,
        returned_token_ids=None if fields.returned_token_ids is None else tuple(fields.returned_token_ids),
    )
    if fields.token_pooling_factor is not None:
        _check_token_pooling(fields, engine)
    if fields.return_tokens:
        _check_return_tokens(fields, engine)
    if fields.muvera is not None:
        _check_muvera(fields, engine)
    if fields.task == "plugin":
        return await _of_plugin(call, fields, params)
    if fields.task == SPARSE:
        return await _of_sparse(call, fields, params)
    if fields.tasks is not None:
        return await _of_several(call, fields, params)
    fields.refuse_pruning()
    task = engine.facts.tasks[0] if fields.task is None else parse_task(fields.task, engine.facts.tasks, (SPARSE,))
    requests = fields.requests(call.engines, task, params)
    names = Names("pooling", "pooling", "data")
    if fields.return_tokens:
        return await _with_tokens(call, fields, requests, names)
    if fields.token_pooling_factor is None:
        return await reply(call, fields, requests, names)
    how = fields.encoding_of(task, engine)
    answers = await call.answers(requests)
    arrays = await asyncio.to_thread(_clustered, answers, fields.token_pooling_factor)
    return await write(call, fields, answers, arrays, names, how)


def _check_token_pooling(fields: PoolingFields, engine: PoolingEngine) -> None:
    """Raise InvalidRequest where token vectors are to be clustered, and the task is another, or several."""
    task = fields.task or engine.facts.tasks[0]
    of_tokens = fields.tasks is None and task not in ("plugin", SPARSE)
    if not of_tokens or parse_task(task, engine.facts.tasks) != "token_embed":
        raise InvalidRequest("token_pooling_factor belongs to the task 'token_embed' alone.", "token_pooling_factor")
    if fields.late_chunking_params is not None:
        raise InvalidRequest("Vectors are pooled by clusters or by chunks, not both.", "token_pooling_factor")
    check_factor(fields.token_pooling_factor, role_of(fields.input_type))


def _check_muvera(fields: PoolingFields, engine: PoolingEngine) -> None:
    """Make token_embed the task where none is named; raise InvalidRequest for what does not give one vector per text."""
    if fields.task is None and fields.tasks is None:
        fields.task = parse_task("token_embed", engine.facts.tasks)
    if fields.task in (None, "plugin", SPARSE) or fields.token_pooling_factor is not None or fields.return_tokens:
        raise InvalidRequest(
            "muvera belongs to the task 'token_embed' alone, without token_pooling_factor and return_tokens.", "muvera"
        )


def _check_return_tokens(fields: PoolingFields, engine: PoolingEngine) -> None:
    """Raise InvalidRequest where rows are to be explained, and are none of tokens, or several tokens each."""
    task = fields.task or engine.facts.tasks[0]
    of_tokens = fields.tasks is None and task not in ("plugin", SPARSE)
    if not of_tokens or parse_task(task, engine.facts.tasks) not in TOKEN_TASKS:
        raise InvalidRequest("return_tokens belongs to the tasks 'token_embed' and 'token_classify'.", "return_tokens")
    if fields.late_chunking_params is not None or fields.token_pooling_factor is not None:
        raise InvalidRequest("return_tokens needs a row per token; leave out chunks and clusters.", "return_tokens")
    if fields.encoding_format not in _IN_JSON:
        raise InvalidRequest("return_tokens comes as float or base64.", "return_tokens")


async def _with_tokens(call: Call, fields: PoolingFields, requests: Sequence[EngineRequest], names: Names) -> Response:
    """The rows of each input, and what each of them stands for."""
    engine, task = call.engine, requests[0].task
    how = fields.encoding_of(task, engine)
    # Only texts have characters.
    answers = await call.answers([replace(one, offsets=one.prompt.text is not None) for one in requests])
    arrays = [shown(answer.array, task, engine.facts.token_weights) for answer in answers]
    tokens = await asyncio.to_thread(lambda: [_tokens(engine, answer) for answer in answers])
    more = [{"tokens": of_rows} | _replies.cut(answer) for of_rows, answer in zip(tokens, answers, strict=True)]
    return await write(call, fields, answers, arrays, names, how, more)


def _tokens(engine: PoolingEngine, answer: Answer) -> RowTokens:
    """What each row of an answer stands for.

    Raises:
        UnsupportedTask: its rows are not those of its tokens (pooled steps).
    """
    tokens = answer.tokens
    rows = np.arange(len(tokens)) if tokens.kept is None else np.flatnonzero(tokens.kept)
    if len(rows) != len(answer.array):
        raise UnsupportedTask("return_tokens needs a row per token, and this model's rows are others.", "return_tokens")
    bounds = np.zeros((len(rows), 2), np.int64) if tokens.offsets is None else tokens.offsets.bounds[rows]
    pictures: list[PictureRows] = []
    if tokens.pictures is not None:
        filled, end = np.flatnonzero(tokens.pictures.filled), 0
        for picture in tokens.pictures.pictures:
            begin, end = end, end + picture.rows
            own = np.searchsorted(rows, filled[begin:end])
            first, last = own[[0, -1]].tolist()
            whole = picture.extent is not None and math.prod(picture.extent) == last - first + 1
            cells = None if picture.cells is None else own[picture.cells].tolist()
            pictures.append({"rows": (first, last + 1), "grid": picture.extent if whole else None, "cells": cells})
    return {"strings": engine.token_strings(tokens.ids[rows].tolist()), "spans": bounds.tolist(), "pictures": pictures}


def _clustered(answers: Sequence[Answer], factor: float) -> list[Array]:
    try:
        return [pooled(answer.array, factor) for answer in answers]
    except ConfigError as error:  # what finds the clusters is not installed here
        raise InvalidRequest(str(error), "token_pooling_factor") from None


async def _of_sparse(call: Call, fields: PoolingFields, params: PoolingParams) -> Response:
    """The sparse vector of each input: its entries, by rising id."""
    if fields.encoding_format not in _IN_JSON:
        raise InvalidRequest("Sparse vectors come as JSON.", "encoding_format", fields.encoding_format)
    plan = sparse.plan(call.engine, (), sparse.SparseOptions(params, top_k=fields.top_k, threshold=fields.threshold))
    answers = await call.answers(fields.requests(call.engines, plan.head.task, params))
    head = call.list_head("pooling", fields.request_id)

    def render() -> bytes:
        items = [
            {"index": index, "object": "pooling", "data": entries(plan.each(answer).vector)} | _replies.cut(answer)
            for index, answer in enumerate(answers)
        ]
        return encoding.render(head, items, {"usage": _replies.usage(answers)})

    return await call.write(render, answers)


async def _of_several(call: Call, fields: PoolingFields, params: PoolingParams) -> Response:
    """The arrays, or sparse vector, of each input by task."""
    engine = call.engine
    if fields.encoding_format not in _IN_JSON:
        raise InvalidRequest(
            "Several tasks come as float or base64; bytes hold one.", "encoding_format", fields.encoding_format
        )
    names = fields.tasks or ()
    if SPARSE not in names:
        fields.refuse_pruning()
    options = sparse.SparseOptions(top_k=fields.top_k, threshold=fields.threshold)
    plan = several.plan(engine, names, options, params)
    passes = (plan.first, *plan.further)
    encodings = {task: fields.encoding_of(task, engine) for task in passes if task in plan.tasks}
    requests = fields.requests(call.engines, plan.first, params)
    answers = await call.answers([replace(request, further=plan.further) for request in requests])
    head = call.list_head("pooling", fields.request_id)

    def render() -> bytes:
        by_task = {
            task: encoding.encode(
                [shown(plan.array(answer, task), task, engine.facts.token_weights) for answer in answers], how
            )
            for task, how in encodings.items()
        }
        items = []
        for index, answer in enumerate(answers):
            data: dict[TaskOrSparse, object] = {
                task: encoding.value(arrays[index], fields.encoding_format) for task, arrays in by_task.items()
            }
            shapes = {
                task: list(arrays[index].shape)
                for task, arrays in by_task.items()
                if encoding.shape(arrays[index], fields.encoding_format)
            }
            if plan.sparse is not None:
                data[SPARSE] = entries(plan.vector(answer))
            item = {"index": index, "object": "pooling", "data": data} | ({"shapes": shapes} if shapes else {})
            items.append(item | _replies.cut(answer))
        return encoding.render(head, items, {"usage": _replies.usage(answers)})

    return await call.write(render, answers)


def entries(vector: SparseVector) -> list[dict[str, object]]:
    """The entries of a sparse vector as JSON has them; features without names have a null token."""
    tokens = [None] * len(vector) if vector.names is None else vector.tokens
    # The weights stay numpy's, which are written as short as float32 allows.
    return [
        {"token_id": entry, "token": token, "weight": weight}
        for entry, token, weight in zip(vector.indices, tokens, vector.weights, strict=True)
    ]


async def _of_plugin(call: Call, fields: PoolingFields, params: PoolingParams) -> Response:
    """What the plugin returns for the answers to the prompts that it wrote for `data`.

    Raises:
        UnsupportedTask: no plugin is installed. InvalidRequest: data that it does not understand. EngineError: output
            that is no JSON.
    """
    engine, plugin = call.engine, call.engine.facts.plugin
    if plugin is None:
        parse_task("plugin", engine.facts.tasks)  # raises, and explains how one is installed
        raise AssertionError
    requests = await asyncio.to_thread(_requests, engine, plugin, fields.data, params)
    call.engines.check_items(len(requests), "data")
    answers = await call.answers(
        [replace(request, priority=fields.priority) for request in requests], "data: prompt {}".format
    )
    outputs = pooling_outputs(answers, task_of(plugin, engine.facts.tasks), engine.facts.token_weights)
    data = await asyncio.to_thread(plugin.post_process, outputs)
    body = {"request_id": call.reply_id("pooling", fields.request_id), "created_at": int(time.time()), "data": data}
    return await call.write(lambda: _json(body), answers)


def _requests(engine: PoolingEngine, plugin: Plugin, data: object, params: PoolingParams) -> list[EngineRequest]:
    task = parse_task(task_of(plugin, engine.facts.tasks), engine.facts.tasks)
    merged = params_of(plugin, params)
    return [EngineRequest(prompt, task, merged) for prompt in parse_prompts(prompts_of(plugin, {"data": data}), "data")]


def _json(body: dict[str, object]) -> bytes:
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        raise EngineError(f"The plugin's output cannot be written as JSON: {error}") from error


class Entry(TypedDict):
    """An entry of a sparse vector; features without names have no token."""

    token_id: int
    token: str | None
    weight: float


Value = Vector | Matrix | list[Entry] | str


class PictureRows(TypedDict):
    """A picture: its first row and the one after its last, and how many lines and columns of cells these are.

    Cells go line by line; null where the rows are no grid. `cells`: of a picture that was read in tiles, the row of each
    cell of the whole picture, in lines.
    """

    rows: tuple[int, int]
    grid: tuple[int, int] | None
    cells: list[list[int]] | None


class RowTokens(TypedDict):
    """What each row stands for: a vocabulary entry, and the characters of the input, none of which are [0, 0]."""

    strings: list[str]
    spans: list[tuple[int, int]]
    pictures: list[PictureRows]


class Pooled(Cut):
    """The answer to an input: a row, a row per token, either in base64 with its shape, or the entries of a sparse vector."""

    index: int
    object: Literal["pooling"]
    data: Value | dict[TaskOrSparse, Value]
    shape: NotRequired[list[int]]
    shapes: NotRequired[dict[TaskOrSparse, list[int]]]
    tokens: NotRequired[RowTokens]
    late_chunking: NotRequired[LateChunking]


class PoolingReply(List):
    """The reply of /pooling; `data` of an item is by task where the request has `tasks`."""

    data: list[Pooled]


class PluginReply(TypedDict):
    """The reply of /pooling to the task `plugin`."""

    request_id: str
    created_at: int
    data: object


DIALECT = Dialect(
    "pooling",
    (
        Route(
            "POST",
            "/pooling",
            pooling,
            PoolingFields,
            (PoolingReply, PluginReply),
            media=BYTES,
            headers=METADATA,
        ),
    ),
)
