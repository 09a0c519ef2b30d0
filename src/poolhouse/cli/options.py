"""Command-line options made from the fields of a settings class, so that each is described once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from poolhouse.cli.spelling import flag
from poolhouse.errors import ConfigError
from poolhouse.settings import Panel

# Fields that stand for themselves on the command line.
_NOT_OPTIONS = ("model",)
# Fields whose words on the command line, and in the environment, are JSON.
JSON_OPTIONS = ("hf_overrides", "pooler_config")


def with_options(*classes: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field; what was set arrives as the mapping `options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        added = {name: (panel, field) for cls in classes for name, panel, field in _with_panels(cls)}

        @wraps(command)
        def with_mapping(**given: Any) -> None:
            set_ones = {name: given.pop(name) for name in list(given) if name in added and name not in own}
            set_ones = {name: value for name, value in set_ones.items() if value is not None}
            command(**given, options=parsed(set_ones, flag))

        parameters = [parameter for name, parameter in own.items() if name != "options"]
        for name, (panel, field) in added.items():
            if name not in own and name not in _NOT_OPTIONS:
                parameters.append(_parameter(name, field, panel))
        with_mapping.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_mapping.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_mapping

    return decorate


def parsed(words: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
    """Options with their JSON read.

    origin: where an option of that name was written, for errors.

    Raises:
        ConfigError: it is no JSON.
    """
    options = dict(words)
    for name in JSON_OPTIONS:
        if isinstance(options.get(name), str):
            try:
                options[name] = json.loads(options[name])
            except ValueError as error:
                raise ConfigError(f"{origin(name)} is not valid JSON: {error}") from None
    return options


def _with_panels(cls: type[BaseModel]) -> Iterator[tuple[str, str, FieldInfo]]:
    panel = "Options"
    for name, field in cls.model_fields.items():
        panel = next((mark.title for mark in field.metadata if isinstance(mark, Panel)), panel)
        yield name, panel, field


def _parameter(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    switch = field.annotation is bool
    words = (field.description or "").rstrip(".")
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if choices:
        words += f": {', '.join(choices)}"
    if not switch and field.default not in (None, "", ()):
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        words += f" ({default})"
    elif switch and field.default:
        words += " (on)"
    declaration = f"{flag(name)}/--no-{flag(name)[2:]}" if switch else flag(name)
    option = typer.Option(None, declaration, help=words, show_default=False, rich_help_panel=panel, metavar="")
    kind: Any = (bool | None) if switch else (str | None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)
