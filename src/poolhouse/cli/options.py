"""Options of commands: made from the fields of settings, read in any spelling, named in messages as typed."""

from __future__ import annotations

import inspect
import json
import re
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from poolhouse.errors import ConfigError, nearest
from poolhouse.settings import (
    DONE_ANYWAY,
    FORMER_NAMES,
    MEANINGLESS,
    OUR_NAMES,
    ServerSettings,
    Settings,
    is_switch,
    panel_of,
    useful_options,
)

# The argument of commands that read one model.
Model = Annotated[str | None, typer.Argument(help="Folder or hub id; none: the embedded default.")]

# Fields that are arguments on the command line, or options of the command itself.
_NOT_OPTIONS = ("model",)
# Fields whose values on the command line, and in the environment, are JSON.
JSON_OPTIONS = ("hf_overrides", "limit_mm_per_prompt", "mm_processor_kwargs", "pooler_config")


def with_options(*classes: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of these classes; those that were set arrive as the mapping `options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        added = {name: field for cls in classes for name, field in cls.model_fields.items()}

        @wraps(command)
        def with_mapping(**values: object) -> None:
            options = {name: values.pop(name) for name in list(values) if name in added and name not in own}
            options = {name: value for name, value in options.items() if value is not None}
            command(**values, options=parsed(options, flag))

        parameters = [parameter for name, parameter in own.items() if name != "options"]
        for name, field in added.items():
            if name not in own and name not in _NOT_OPTIONS:
                parameters.append(_parameter(name, field))
        with_mapping.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_mapping.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_mapping

    return decorate


def parsed(options: Mapping[str, object], origin: Callable[[str], str]) -> dict[str, object]:
    """Options with their JSON read.

    origin: for errors, how the option of that name was written.

    Raises:
        ConfigError: it is no JSON.
    """
    options = dict(options)
    for name in JSON_OPTIONS:
        text = options.get(name)
        if isinstance(text, str):
            try:
                options[name] = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{origin(name)} is not valid JSON: {error}") from None
    return options


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    switch = field.annotation is bool
    text = (field.description or "").rstrip(".")
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if choices:
        text += f": {', '.join(choices)}"
    if not switch and field.default not in (None, "", ()):
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        text += f" ({default})"
    elif switch and field.default:
        text += " (on)"
    declaration = f"{flag(name)}/--no-{flag(name)[2:]}" if switch else flag(name)
    option = typer.Option(None, declaration, help=text, show_default=False, rich_help_panel=panel_of(field), metavar="")
    annotation = (bool | None) if switch else (str | None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


_FIELDS = {**Settings.model_fields, **ServerSettings.model_fields}
# Options of the command itself.
_OWN = {"config"}
_HELP = {"help"}
_NAMES = "served_model_name"


def arranged(arguments: Sequence[str]) -> list[str]:
    """The same options with one value each, then the models; as typer reads them.

    `m --max_model_len 64 --api-key a --api-key b` becomes `--max-model-len 64 --api-key '["a", "b"]' -- m`.

    An option may be written with - or _, under vLLM's name, with several values, repeated where it takes several, or
    one field at a time (`--pooler-config.FIELD`). vLLM's options that no field describes go into `--other-options`.

    Raises:
        ConfigError: an option that does not exist, or without its value, or names that may be models.
    """
    return _Walk(arguments).arranged()


def join_dotted(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--pooler-config.FIELD value` gathered into one `--pooler-config '{...}'`."""
    joined: list[str] = []
    fields: dict[str, dict[str, object]] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, dot, tail = argument.partition(".")
        name = option.removeprefix("--").replace("-", "_")
        if not (dot and option.startswith("--") and name in JSON_OPTIONS):
            joined.append(argument)
            continue
        path, equals, value = tail.partition("=")
        if not equals:
            value = _value_of(argument, rest)
        if name not in fields:
            joined += [flag(name), ""]
        _set_in(fields.setdefault(name, {}), path.replace("-", "_").split("."), _json_or_text(value))
    for name, mapping in fields.items():
        # The empty text that was left above, where the first field stood.
        index = next(n for n, text in enumerate(joined) if text == "" and joined[n - 1] == flag(name))
        joined[index] = json.dumps(mapping)
    return joined


def _set_in(mapping: dict[str, object], path: Sequence[str], value: object) -> None:
    for name in path[:-1]:
        inner = mapping.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"'{name}' is given both a value and fields of its own.")
        mapping = inner
    mapping[path[-1]] = value


class _Walk:
    """One pass over the arguments."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.rest = list(arguments)
        self.models: list[str] = []
        self.options: dict[str, list[str]] = {}
        self.switches: list[str] = []
        self.others: dict[str, object] = {}
        # What stands behind the last --served-model-name; the last of it may be the model.
        self.names: list[str] = []

    def arranged(self) -> list[str]:
        names_stand_last = False
        while self.rest:
            argument = self.rest.pop(0)
            if argument == "--":
                self.models += self.rest
                break
            if not argument.startswith("-") or argument == "-":
                self.models.append(argument)
                continue
            written, equals, value = argument[2:].partition("=")
            name = written.replace("-", "_")
            negated = "no_" * (name.startswith("no_") and name[3:] in OUR_NAMES)
            name = negated + OUR_NAMES.get(name.removeprefix(negated), name.removeprefix(negated))
            if not argument.startswith("--") or not _exists(name):
                typed = argument.partition("=")[0]
                raise ConfigError(f"There is no option {typed}.{near_flag(typed, useful_options() | _OWN)}")
            self._option(name, argument if not equals else None, value)
            names_stand_last = name == _NAMES
        if len(self.names) > 1 and not self.models:
            self._tell_names_from_model(names_stand_last)
        if self.names:
            self.options[_NAMES] = self.names
        return self._in_order()

    def _option(self, name: str, argument: str | None, value: str) -> None:
        """Take the option and its values. argument: as it was written; None where its value stands in the same argument."""
        positive = name.removeprefix("no_")
        field, switch = _FIELDS.get(name), _FIELDS.get(positive)
        if name in _HELP:
            self.switches.append("--help")
        elif switch is not None and switch.annotation is bool:
            on = (argument is not None or _json_or_text(value) is True) != (name != positive)
            self.switches.append(flag(positive) if on else "--no-" + flag(positive)[2:])
        elif name == _NAMES:
            self.names = [value] if argument is None else [_value_of(argument, self.rest)]
            while self.rest and not self.rest[0].startswith("--"):
                self.names.append(self.rest.pop(0))
        elif field is not None or name in _OWN:
            values = [value] if argument is None else [_value_of(argument, self.rest)]
            further = _FURTHER_VALUES.get(name)
            while further is not None and self.rest and further(self.rest[0]):
                values.append(self.rest.pop(0))
            several = name == "lora_modules" or (field is not None and _takes_several(field))
            self.options[name] = [*self.options.get(name, []), *values] if several else values
        else:
            self._other(name, argument, value)

    def _other(self, name: str, argument: str | None, value: str) -> None:
        positive = name.removeprefix("no_")
        known = positive in MEANINGLESS or positive in DONE_ANYWAY
        if argument is None:
            self.others[positive] = _json_or_text(value)
        elif (known and is_switch(positive)) or not self.rest or self.rest[0].startswith("--"):
            self.others[positive] = positive == name
        else:
            self.others[positive] = _json_or_text(self.rest.pop(0))

    def _tell_names_from_model(self, stand_last: bool) -> None:
        """Without a model elsewhere, the last argument of the line is the model, as in any command."""
        if stand_last:
            self.models.append(self.names.pop())
        elif "config" not in self.options:
            names = " ".join(self.names)
            raise ConfigError(
                f"--served-model-name {names}: which of these is the model? Put the model first: "
                f"serve MODEL --served-model-name {names}."
            )

    def _in_order(self) -> list[str]:
        arguments: list[str] = []
        for name, values in self.options.items():
            if len(values) == 1:
                joined = values[0]
            else:
                # A JSON list keeps values whole that hold a comma; adapters have a grammar of their own.
                joined = ",".join(values) if name == "lora_modules" else json.dumps(values)
            arguments += [flag(name), joined]
        arguments += self.switches
        if self.others:
            arguments += ["--other-options", json.dumps(self.others)]
        return [*arguments, "--", *self.models] if self.models else arguments


def _takes_several(field: FieldInfo) -> bool:
    """Whether a field is a tuple, or may be one."""
    annotation = field.annotation
    return any(get_origin(one) is tuple for one in (annotation, *get_args(annotation)))


def _exists(name: str) -> bool:
    """Whether an option, or its opposite (`no_`), is one of ours or of vLLM's."""
    known = useful_options() | MEANINGLESS | DONE_ANYWAY | set(FORMER_NAMES) | _OWN | _HELP
    return name in known or name.removeprefix("no_") in known


def _is_adapter(argument: str) -> bool:
    return argument.startswith("{") or ("=" in argument and not argument.startswith("-"))


def _is_host(argument: str) -> bool:
    return not argument.startswith("-") and "/" not in argument


# Options that take several values one after another, as in vLLM, and what may be one of them.
_FURTHER_VALUES: Mapping[str, Callable[[str], bool]] = {
    "lora_modules": _is_adapter,
    "allowed_media_domains": _is_host,
}


def _value_of(argument: str, rest: list[str]) -> str:
    """The argument behind an option.

    Raises:
        ConfigError: there is none.
    """
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"{argument} needs a value.")
    return rest.pop(0)


def _json_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True, slots=True)
class Written:
    """An option as it was written. sign: what separates it from a value. where: " in FILE", if that must be said."""

    name: str
    sign: str = " "
    where: str = ""


def on_the_line(names: Iterable[str], typed: Mapping[str, str] | None = None) -> dict[str, Written]:
    """Options as the command line has them, by their names in Python. typed: those that were written otherwise."""
    return {name: Written((typed or {}).get(name, flag(name))) for name in names}


def flag(name: str) -> str:
    """A field's name as an option: `max_model_len` is `--max-model-len`."""
    return "--" + name.replace("_", "-")


def as_typed(arguments: Iterable[str]) -> dict[str, str]:
    """The options of a line as they were typed, by their names in Python: `--max_model_len`, vLLM's names."""
    found = {}
    for argument in arguments:
        if argument == "--":
            break
        if argument.startswith("--"):
            typed = argument.partition("=")[0]
            name = typed[2:].partition(".")[0].replace("-", "_")
            found[OUR_NAMES.get(name, name)] = typed.partition(".")[0]
    return found


def near_flag(typed: str, known: Iterable[str]) -> str:
    """`" Did you mean --x?"` for the option nearest to what was typed, else nothing."""
    known = list(known)
    name = typed.lstrip("-").partition(".")[0].replace("-", "_")
    opposite = nearest(name[3:], known) if name.startswith("no_") else None
    near = nearest(name, known) if opposite is None else f"no_{opposite}"
    return "" if near is None else f" Did you mean {flag(near)}?"


def spelled(message: str, options: Mapping[str, Written]) -> str:
    """A message that names options as Python does, with them as they were written.

    An option is found where it has a value (`dtype='int3'`), before a colon, in quotes, or by the underscore in its name.
    """
    # The longest first: a name may begin with another.
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    pattern = rf"(?<![\w.\-/'\"`])(?P<quote>['`]?)(?P<name>{names})(?P=quote)(?P<field>(?:\.\w+)*)(?![\w-])(?:=(?P<value>{_VALUE}))?"
    return re.sub(pattern, lambda found: _rewritten(found, options), message) if options else message


_VALUE = r"'[^']*'|\"[^\"]*\"|\{[^{}]*\}|-?\w[\w.+-]*\w|-?\w"


def _rewritten(found: re.Match[str], options: Mapping[str, Written]) -> str:
    name, value = found["name"], found["value"]
    written = options[name]
    if value is not None:
        return f"{written.name}{found['field']}{written.sign}{_plain(value)}{written.where}"
    after = found.string[found.end() :]
    before = found.string[: found.start()]
    opens = after.startswith(":") and (not before or before.endswith(("; ", ": ", "(")))
    if found["quote"] or "_" in name or opens:
        return f"{written.name}{found['field']}{written.where}"
    return found[0]


def _plain(value: str) -> str:
    """A value of Python as a line or a file has it."""
    try:
        read = literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    if isinstance(read, dict):
        return f"'{json.dumps(read)}'"
    return read if isinstance(read, str) and read.strip() and " " not in read else value
