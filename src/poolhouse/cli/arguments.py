"""The words behind `serve` as vLLM's users write them, brought into the order that the command reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from poolhouse.cli.options import JSON_OPTIONS
from poolhouse.cli.spelling import flag, near_flag
from poolhouse.errors import ConfigError
from poolhouse.settings import ServerSettings, Settings, useful_options
from poolhouse.vllm_options import DONE_ANYWAY, FORMER_NAMES, MEANINGLESS, OUR_NAMES, is_switch

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
