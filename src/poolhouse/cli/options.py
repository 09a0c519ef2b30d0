"""Command-line options made from the fields of a settings class, so that each is described once."""

from __future__ import annotations

import inspect
import json
import re
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from poolhouse.errors import ConfigError, nearest
from poolhouse.settings import (
    DONE_ANYWAY,
    FORMER_NAMES,
    MEANINGLESS,
    OUR_NAMES,
    Panel,
    ServerSettings,
    Settings,
    is_switch,
    useful_options,
)

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


# Options of the command itself.
_OWN = {"config"}
_HELP = {"help"}
_NAMES = "served_model_name"


def arranged(arguments: Sequence[str]) -> list[str]:
    """The same options with one value each, then the models.

    An option may be written with - or _, under vLLM's name, with several values, repeated where it takes several, or
    one field at a time (`--pooler-config.FIELD`). vLLM's options that no field describes go into `--other-options`.

    Raises:
        ConfigError: an option that does not exist, or without its value, or names that may be models.
    """
    return _Walk(arguments).words()


def join_dotted(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--pooler-config.FIELD value` gathered into one `--pooler-config '{...}'`."""
    joined: list[str] = []
    fields: dict[str, dict[str, Any]] = {}
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
        inner = fields.setdefault(name, {})
        *parents, last = path.replace("-", "_").split(".")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = _read(value)
    for name, mapping in fields.items():
        # The empty word that was left above, where the first field stood.
        place = next(n for n, word in enumerate(joined) if word == "" and joined[n - 1] == flag(name))
        joined[place] = json.dumps(mapping)
    return joined


class _Walk:
    """One pass over the arguments."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.rest = list(arguments)
        self.models: list[str] = []
        self.options: dict[str, list[str]] = {}
        self.switches: list[str] = []
        self.others: dict[str, Any] = {}
        # Words behind the last --served-model-name, of which the last may be the model.
        self.names: list[str] = []

    def words(self) -> list[str]:
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
            name = OUR_NAMES.get(name, name)
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
        """Take the option and its values. argument: as it was written, where its value was not within."""
        field = Settings.model_fields.get(name) or ServerSettings.model_fields.get(name)
        positive = name.removeprefix("no_")
        switch = Settings.model_fields.get(positive) or ServerSettings.model_fields.get(positive)
        if name in _HELP:
            self.switches.append("--help")
        elif switch is not None and switch.annotation is bool:
            on = (argument is not None or _read(value) is True) != (name != positive)
            self.switches.append(flag(positive) if on else "--no-" + flag(positive)[2:])
        elif name == _NAMES:
            self.names = [value] if argument is None else [_value_of(argument, self.rest)]
            while self.rest and not self.rest[0].startswith("--"):
                self.names.append(self.rest.pop(0))
        elif field is not None or name in _OWN:
            given = [value] if argument is None else [_value_of(argument, self.rest)]
            while name == "lora_modules" and self.rest and _is_adapter(self.rest[0]):
                given.append(self.rest.pop(0))
            several = name == "lora_modules" or (field is not None and "tuple" in str(field.annotation))
            self.options[name] = [*self.options.get(name, []), *given] if several else given
        else:
            self._other(name, argument, value)

    def _other(self, name: str, argument: str | None, value: str) -> None:
        positive = name.removeprefix("no_")
        known = positive in MEANINGLESS or positive in DONE_ANYWAY
        if argument is None:
            self.others[positive] = _read(value)
        elif (known and is_switch(positive)) or not self.rest or self.rest[0].startswith("--"):
            self.others[positive] = positive == name
        else:
            self.others[positive] = _read(self.rest.pop(0))

    def _tell_names_from_model(self, stand_last: bool) -> None:
        """Without a model elsewhere, the last word of the line is the model, as in any command."""
        if stand_last:
            self.models.append(self.names.pop())
        elif "config" not in self.options:
            words = " ".join(self.names)
            raise ConfigError(
                f"--served-model-name {words}: which of these is the model? Put the model first: "
                f"serve MODEL --served-model-name {words}."
            )

    def _in_order(self) -> list[str]:
        words: list[str] = []
        for name, values in self.options.items():
            # A JSON list keeps words whole that hold a comma; adapters have a grammar of their own.
            several = "," if name == "lora_modules" else None
            joined = values[0] if len(values) == 1 else several.join(values) if several else json.dumps(values)
            words += [flag(name), joined]
        words += self.switches
        if self.others:
            words += ["--other-options", json.dumps(self.others)]
        return [*words, "--", *self.models] if self.models else words


def _exists(name: str) -> bool:
    """Whether an option, or its opposite (`no_`), is one of ours or of vLLM's."""
    known = useful_options() | MEANINGLESS | DONE_ANYWAY | set(FORMER_NAMES) | _OWN | _HELP
    return name in known or name.removeprefix("no_") in known


def _is_adapter(word: str) -> bool:
    return word.startswith("{") or ("=" in word and not word.startswith("-"))


def _value_of(argument: str, rest: list[str]) -> str:
    """The word behind an option.

    Raises:
        ConfigError: there is none.
    """
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"{argument} needs a value.")
    return rest.pop(0)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True, slots=True)
class Written:
    """An option as it stands in one place. sign: what separates it from a value. place: where, if that must be said."""

    name: str
    sign: str = " "
    place: str = ""


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
    """A message in Python's words with its options as they were written.

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
        return f"{written.name}{found['field']}{written.sign}{_plain(value)}{written.place}"
    after = found.string[found.end() :]
    before = found.string[: found.start()]
    opens = after.startswith(":") and (not before or before.endswith(("; ", ": ", "(")))
    if found["quote"] or "_" in name or opens:
        return f"{written.name}{found['field']}{written.place}"
    return found[0]


def _plain(value: str) -> str:
    """A value of Python as a line or a file has it."""
    try:
        given = literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    if isinstance(given, dict):
        return f"'{json.dumps(given)}'"
    return given if isinstance(given, str) and given.strip() and " " not in given else value
