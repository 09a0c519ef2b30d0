"""Plugins: installed code that turns its own data into prompts, and the answers into its own output.

A package offers a plugin by an entry point of a group in GROUPS: the plugin's class, or a function that returns the class
or its dotted name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """The methods of a plugin, which is created as `Class(settings, tokenizer)`.

    It may also have `merge_pooling_params(params) -> PoolingParams`, and an attribute `task`: the task of its prompts;
    the default is the model's first task.
    """

    def parse_data(self, data: Any) -> Any:
        """The caller's data, checked; raises ValueError or TypeError for invalid data."""
        ...

    def pre_process(self, prompt: Any, request_id: str | None = None) -> Any:
        """One prompt or many, in any form that `LLM.encode` takes."""
        ...

    def post_process(self, model_output: Sequence[PoolingRequestOutput], request_id: str | None = None) -> Any:
        """The output for the caller, from the answers in the order of the prompts."""
        ...


def load_plugin(name: str, settings: object, tokenizer: object) -> Plugin:
    """The installed plugin of that name.

    Raises:
        ConfigError: it is not installed, or cannot be loaded.
    """
    found = {entry.name: entry for group in reversed(GROUPS) for entry in entry_points(group=group)}
    if name not in found:
        raise ConfigError(
            f"The model requires the '{name}' IO Processor plugin but it is not installed. "
            f"Installed plugins: {sorted(found)}."
        )
    try:
        plugin = _class(found[name].load())(settings, tokenizer)
    except Exception as error:
        raise ConfigError(f"The IO Processor plugin '{name}' cannot be loaded: {error}") from error
    missing = [method for method in ("parse_data", "pre_process", "post_process") if not hasattr(plugin, method)]
    if missing:
        raise ConfigError(f"The IO Processor plugin '{name}' lacks {missing}.")
    return plugin


def prompts_of(plugin: Plugin, prompts: object) -> Any:
    """The plugin's prompts for `{"data": ...}`, in any form that `LLM.encode` takes.

    Raises:
        InvalidRequest: prompts of another form, or data that the plugin refuses.
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
    """The task of a plugin's prompts."""
    return str(getattr(plugin, "task", tasks[0]))


def is_data(prompts: object) -> TypeGuard[PluginPrompt]:
    """Whether prompts are data for a plugin: `{"data": ...}`."""
    return isinstance(prompts, dict) and "data" in prompts


def _class(entry: Any) -> Callable[[object, object], Plugin]:
    """The class of an entry point: itself, or what it returns, or the class of that dotted name."""
    found: Any = entry if isinstance(entry, type) else entry()
    if isinstance(found, str):
        module, _, name = found.rpartition(".")
        found = getattr(import_module(module), name)
    return found  # type: ignore[no-any-return]
