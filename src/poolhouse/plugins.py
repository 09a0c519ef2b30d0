"""Plugins: code of others that turns its own data into prompts and the answers into its own output.

A package offers one by an entry point of a group in GROUPS; the entry point is the plugin's class, or a function that
returns the class or its dotted name.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, TypedDict, TypeGuard

from poolhouse.errors import ConfigError, InvalidRequest
from poolhouse.outputs import PoolingRequestOutput
from poolhouse.params import PoolingParams
from poolhouse.tasks import Task

GROUPS = ("poolhouse.io_processor_plugins", "vllm.io_processor_plugins")


class PluginPrompt(TypedDict):
    """A prompt for a plugin, which checks the data itself."""

    data: object


class Plugin(Protocol):
    """What a plugin must have; it is made as `Class(settings, tokenizer)`.

    It may also have `merge_pooling_params(params) -> PoolingParams`, and an attribute `task`: which of the model's tasks
    its prompts run, the first where it says nothing.
    """

    def parse_data(self, data: Any) -> Any:
        """The caller's data, checked; raises ValueError or TypeError for what it does not understand."""
        ...

    def pre_process(self, prompt: Any, request_id: str | None = None) -> Any:
        """One prompt or a list of them, in any form that `LLM.encode` takes."""
        ...

    def post_process(self, model_output: Sequence[PoolingRequestOutput], request_id: str | None = None) -> Any:
        """What the caller gets, made of the answers in the order of the prompts."""
        ...


def load_plugin(name: str, settings: Any, tokenizer: Any) -> Plugin:
    """The installed plugin of that name.

    Raises:
        ConfigError: none, or one that cannot be made.
    """
    found = {entry.name: entry for group in reversed(GROUPS) for entry in entry_points(group=group)}
    if name not in found:
        raise ConfigError(
            f"The model requires the '{name}' IO Processor plugin but it is not installed. "
            f"Installed plugins: {sorted(found)}."
        )
    try:
        made: Plugin = _class(found[name].load())(settings, tokenizer)
    except Exception as error:
        raise ConfigError(f"The IO Processor plugin '{name}' cannot be loaded: {error}") from error
    missing = [method for method in ("parse_data", "pre_process", "post_process") if not hasattr(made, method)]
    if missing:
        raise ConfigError(f"The IO Processor plugin '{name}' lacks {missing}.")
    return made


def prompts_of(plugin: Plugin, prompts: object) -> Any:
    """The prompts that a plugin makes of `{"data": ...}`.

    Raises:
        InvalidRequest: prompts of another form, or data that the plugin does not understand.
    """
    if not is_data(prompts):
        raise InvalidRequest('pooling_task="plugin" takes one prompt of the form {"data": ...}.', "prompts")
    try:
        return plugin.pre_process(plugin.parse_data(prompts["data"]))
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequest(f"The plugin does not understand the data: {error}", "data") from error


def params_of(plugin: Plugin, params: PoolingParams | None) -> PoolingParams:
    """The caller's parameters, completed by the plugin."""
    merge = getattr(plugin, "merge_pooling_params", None)
    merged = params if merge is None else merge(params)
    return PoolingParams() if merged is None else merged


def task_of(plugin: Plugin, tasks: tuple[Task, ...]) -> str:
    """The task of the model that a plugin's prompts run."""
    return str(getattr(plugin, "task", tasks[0]))


def is_data(prompts: object) -> TypeGuard[PluginPrompt]:
    return isinstance(prompts, dict) and "data" in prompts


def _class(loaded: Any) -> Any:
    made = loaded if isinstance(loaded, type) else loaded()
    if not isinstance(made, str):
        return made
    module, _, name = made.rpartition(".")
    return getattr(import_module(module), name)
