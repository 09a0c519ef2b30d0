"""Command-line options made from the fields of a settings class, so that each is described once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from poolhouse.errors import ConfigError
from poolhouse.settings import Settings

# Fields that stand for themselves on the command line, or cannot be written there.
_NOT_OPTIONS = ("model",)
_JSON = ("hf_overrides", "pooler_config")


def with_options(*classes: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field; what was set arrives as the mapping `options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        added = {name: (cls, field) for cls in classes for name, field in cls.model_fields.items()}

        @wraps(command)
        def with_mapping(**given: Any) -> None:
            set_ones = {name: given.pop(name) for name in list(given) if name in added and name not in own}
            command(**given, options=_parsed({name: value for name, value in set_ones.items() if value is not None}))

        parameters = [parameter for name, parameter in own.items() if name != "options"]
        for name, (cls, field) in added.items():
            if name not in own and name not in _NOT_OPTIONS:
                parameters.append(_parameter(name, field, cls))
        with_mapping.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_mapping.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_mapping

    return decorate


def join_dotted(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--pooler-config.FIELD value` gathered into one `--pooler-config '{...}'`."""
    joined: list[str] = []
    fields: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--pooler-config."):
            joined.append(argument)
            continue
        name, equals, value = argument.removeprefix("--pooler-config.").partition("=")
        if not equals:
            value = next(rest, "")
        fields[name.replace("-", "_")] = _value(value)
    return [*joined, "--pooler-config", json.dumps(fields)] if fields else joined


def join_lora_modules(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--lora-modules a=PATH b=PATH`, as vLLM takes it, made one word."""
    joined: list[str] = []
    for argument in arguments:
        goes_on = len(joined) > 1 and joined[-2] == "--lora-modules" and not argument.startswith("-")
        if goes_on and ("=" in argument or argument.startswith("{")):
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined


def join_served_names(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--served-model-name a b` made one word, where the model stands first, as in vLLM's own examples.

    Else the second name could be the model.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    joined: list[str] = []
    for argument in arguments:
        if len(joined) > 1 and joined[-2] == "--served-model-name" and not argument.startswith("-"):
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined


def join_unknown(arguments: Sequence[str], *classes: type[BaseModel]) -> list[str]:
    """Arguments with options that no field describes gathered into one `--other-options '{...}'`, for Settings to judge.

    So vLLM's options that mean nothing here are accepted, and a misspelt one is met with the nearest name.
    """
    known = {"--help", "--other-options"}
    for name in (name for cls in classes for name in cls.model_fields):
        flag = name.replace("_", "-")
        known |= {f"--{flag}", f"--no-{flag}"}
    joined: list[str] = []
    others: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or flag in known:
            joined.append(argument)
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        others[flag.removeprefix("--").removeprefix("no-").replace("-", "_")] = _value(value)
    return [*joined, "--other-options", json.dumps(others)] if others else joined


def _parameter(name: str, field: FieldInfo, cls: type[BaseModel]) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    panel = "Model" if cls is Settings else "Server"
    words = field.description or ""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if choices:
        words += f" One of {', '.join(choices)}."
    if field.default is not None and field.annotation is not bool:
        words += f" Default: {field.default}."
    kind: Any = (bool | None) if field.annotation is bool else (str | None)
    names = (flag, f"--no-{flag[2:]}") if field.annotation is bool else (flag,)
    declaration = "/".join(names)
    option = typer.Option(None, declaration, help=words, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _parsed(options: Mapping[str, Any]) -> dict[str, Any]:
    parsed = dict(options)
    for name in _JSON:
        if isinstance(parsed.get(name), str):
            try:
                parsed[name] = json.loads(parsed[name])
            except ValueError as error:
                raise ConfigError(f"--{name.replace('_', '-')} is not valid JSON: {error}") from None
    if isinstance(parsed.get("served_model_name"), str):
        parsed["served_model_name"] = tuple(name.strip() for name in parsed["served_model_name"].split(","))
    return parsed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
