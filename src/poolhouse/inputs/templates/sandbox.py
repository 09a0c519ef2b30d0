"""Jinja templates of checkpoints and callers, compiled once and run within bounds.

They see what they see in transformers. Bounded are: the seconds of a run (looked at in every round of a loop and every
call of a macro), the characters of its output, of joined and of repeated texts, the size of powers, and `range`. One
filter or method that is asked for gigabytes by itself (`join`, `center`, `format`) is not stopped.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from poolhouse.errors import InvalidRequest

# The longest run of a template, and the most characters (or entries of a list) that it may make.
SECONDS = 5.0
CHARACTERS = 2**25
_POWER_BITS = 4096
# A width or precision of a format that is large, or given by a value.
_WIDE = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{5}|\d*\.(\*|\d{5}))")

_deadline: ContextVar[float] = ContextVar("deadline of the template that runs")


def render(text: str, variables: Mapping[str, Any], name: str, keep_last_newline: bool = False) -> str:
    """What a template makes of variables.

    name: what to call it in messages. keep_last_newline: False drops the template's own, as transformers does.

    Raises:
        InvalidRequest: it does not compile, raises, or goes beyond a bound.
    """
    template = _compiled(text, name, keep_last_newline)
    token = _deadline.set(time.monotonic() + SECONDS)
    parts, characters = [], 0
    try:
        for part in template.generate(variables):
            characters += len(part)
            _check_size(characters)
            parts.append(part)
    except Exception as error:  # a template may raise anything
        raise InvalidRequest(f"The {name} failed: {error}", "chat_template") from error
    finally:
        _deadline.reset(token)
    return "".join(parts)


def syntax_tree(text: str, name: str) -> nodes.Template:
    """The template's syntax tree, as it was written.

    Raises:
        InvalidRequest: it does not compile.
    """
    try:
        return _environment(False).parse(text)
    except TemplateError as error:
        raise _does_not_compile(name, error) from error


@lru_cache(maxsize=64)
def _compiled(text: str, name: str, keep_last_newline: bool) -> Template:
    environment = _environment(keep_last_newline)
    try:
        return environment.from_string(_Bounds().visit(environment.parse(text)))
    except TemplateError as error:
        raise _does_not_compile(name, error) from error


def _does_not_compile(name: str, error: TemplateError) -> InvalidRequest:
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if line else ""
    return InvalidRequest(f"The {name} does not compile{where}: {error}", "chat_template")


@lru_cache(maxsize=2)
def _environment(keep_last_newline: bool) -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=keep_last_newline,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=_now,
        namespace=_PlainNamespace,
        dict=_dict,
    )
    del environment.globals["lipsum"]
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which bounds `range` and hides Python's insides, with operators bounded too."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    _check_size(len(value) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _POWER_BITS:
                raise SecurityError("a power is too large.")
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("a format asks for too wide a text.")
        result = super().call_binop(context, operator, left, right)
        if operator == "+" and isinstance(result, str | list | tuple):
            _check_size(len(result))
        return result

    def tick(self) -> str:
        """One round of a loop, or one call of a macro."""
        if time.monotonic() > _deadline.get():
            raise SecurityError(f"it ran for more than {SECONDS:g} seconds.")
        return ""

    def joined(self, *parts: Any) -> str:
        """What `~` makes."""
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)


class _Bounds(NodeTransformer):
    """Puts the checks of time and size into a template."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For | nodes.Macro | nodes.Block):
            node.body.insert(0, nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno))
        if isinstance(node, nodes.Concat):
            return _call("joined", node.nodes, node.lineno)
        return node


class _Generation(Extension):
    """`{% generation %}`, by which trainers mark the assistant's words; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _PlainNamespace(Namespace):
    """jinja2's namespace without names of Python's insides."""

    def __init__(self, /, *given: Any, **named: Any) -> None:
        super().__init__()
        for name, value in dict(*given, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}.")
        super().__setitem__(name, value)


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=line)


def _check_size(size: int) -> None:
    if size > CHARACTERS:
        raise SecurityError(f"it makes more than {CHARACTERS} characters.")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _dict(*given: Any, **named: Any) -> dict[Any, Any]:
    """A function in place of the class, whose attributes a template could reach."""
    return dict(*given, **named)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: jinja2's own escapes what HTML would misread."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
