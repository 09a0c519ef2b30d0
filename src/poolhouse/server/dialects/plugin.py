"""A plugin's own data on /pooling, and its own output."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import orjson
from fastapi import Request, Response

from poolhouse.engine.answers import pooling_outputs
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import EngineError
from poolhouse.inputs.prompts import parse_prompts
from poolhouse.params import PoolingParams
from poolhouse.plugins import Plugin, params_of, prompts_of, task_of
from poolhouse.server import replies
from poolhouse.server.serving import Engine, Serving
from poolhouse.tasks import parse_task


async def answer(
    serving: Serving,
    http: Request,
    engine: Engine,
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
    plugin = engine.plugin
    if plugin is None:
        parse_task("plugin", engine.tasks)  # says how one is installed
        raise AssertionError
    requests = await asyncio.to_thread(_requests, engine, plugin, data, params)
    serving.check_items(len(requests), "data")
    answers = await serving.answers(
        http, engine, [replace(request, priority=priority) for request in requests], "data: prompt {}".format
    )
    outputs = pooling_outputs(answers, task_of(plugin, engine.tasks), engine)
    made = await asyncio.to_thread(plugin.post_process, outputs)
    body = {"request_id": replies.reply_id("pooling", http, request_id), "created_at": int(time.time()), "data": made}
    return await replies.write(serving, lambda: _json(body), answers)


def _requests(engine: Engine, plugin: Plugin, data: Any, params: PoolingParams) -> list[EngineRequest]:
    task = parse_task(task_of(plugin, engine.tasks), engine.tasks)
    merged = params_of(plugin, params)
    return [EngineRequest(prompt, task, merged) for prompt in parse_prompts(prompts_of(plugin, {"data": data}), "data")]


def _json(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        raise EngineError(f"The plugin's output cannot be written as JSON: {error}") from error
