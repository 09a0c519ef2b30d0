"""Messages that name options as whoever reads them wrote them: `--max-model-len`, `POOLHOUSE_PORT`, a key of a file."""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from poolhouse.errors import nearest
from poolhouse.vllm_options import OUR_NAMES


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
