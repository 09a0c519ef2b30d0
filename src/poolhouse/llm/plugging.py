"""`LLM.encode` with `pooling_task="plugin"`: a plugin's data in, its own output out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from poolhouse.engine.answers import pooling_outputs
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.waiting import gather
from poolhouse.errors import InvalidRequest
from poolhouse.llm.answering import wait
from poolhouse.llm.asking import Asked, requests_of
from poolhouse.outputs import PoolingRequestOutput
from poolhouse.params import PoolingParams
from poolhouse.plugins import Plugin, is_data, params_of, prompts_of, task_of
from poolhouse.tasks import parse_task

if TYPE_CHECKING:
    from poolhouse.engine.engine import Engine


def wanted(engine: Engine, prompts: Any, pooling_task: str | None) -> Plugin | None:
    """The plugin, where the call is meant for it.

    Raises:
        InvalidRequest: a plugin's data in a call for another task. UnsupportedTask: no plugin.
    """
    if pooling_task == "plugin":
        if engine.plugin is None:
            parse_task("plugin", engine.tasks)
        return engine.plugin
    if is_data(prompts):
        raise InvalidRequest('Prompts of the form {"data": ...} are for pooling_task="plugin".', "pooling_task")
    return None


def encode(
    engine: Engine,
    plugin: Plugin,
    data: Any,
    asked: Asked,
    use_tqdm: bool | Callable[..., Any],
) -> list[PoolingRequestOutput]:
    """One output, whose `outputs` is what the plugin makes of the answers."""
    requests = _requests(engine, plugin, data, asked)
    return _processed(engine, plugin, wait(engine.submit(requests), use_tqdm, "plugin"))


async def encode_async(engine: Engine, plugin: Plugin, data: Any, asked: Asked) -> list[PoolingRequestOutput]:
    """`encode` for coroutines; the plugin's own work is done in a thread."""
    requests = await asyncio.to_thread(_requests, engine, plugin, data, asked)
    answers = await gather(engine.submit(requests))
    return await asyncio.to_thread(_processed, engine, plugin, answers)


def _requests(engine: Engine, plugin: Plugin, data: Any, asked: Asked) -> list[Request]:
    params = asked.params
    if params is not None and not isinstance(params, PoolingParams):
        raise InvalidRequest("pooling_params: a plugin takes one PoolingParams for all its prompts.", "pooling_params")
    task = parse_task(task_of(plugin, engine.tasks), engine.tasks)
    merged = params_of(plugin, params)
    return requests_of(engine, prompts_of(plugin, data), task, replace(asked, params=merged))


def _processed(engine: Engine, plugin: Plugin, answers: Sequence[Answer]) -> list[PoolingRequestOutput]:
    # As in vLLM: the plugin decides what `outputs` is, and the whole has no id.
    made: Any = plugin.post_process(pooling_outputs(answers, task_of(plugin, engine.tasks), engine))
    return [PoolingRequestOutput("", made, [])]
