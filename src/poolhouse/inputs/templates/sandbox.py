"""Sandbox: Jinja templates run within bounds of time and size, and how they read contents of messages.

A template may come from anyone who sends a request. It sees what it would see in transformers, and it must not run for
ever, fill the memory or reach Python's internals. jinja2's sandbox hides the internals. Time and memory are bounded by
checks that are put into the template:

    text --parse--> syntax tree --_Bounds--> syntax tree with checks --compile--> template, kept for the next call

    {% for x in xs %} ... {% endfor %}      {% for x in xs %} tick() ... {% endfor %}     time: every round of a loop,
    {% macro m(x) %} ... {% endmacro %}     {% macro m(x) %} tick() ... {% endmacro %}    every call of a macro or block
    {{ a ~ b }}                             {{ joined(a, b) }}                            size of joined texts
    {{ a + b }}, {{ a * 9 }}, **, %         {{ call_binop(...) }}                         size of results, before or after

A template can only run long by loops and by macros or blocks that call each other, so `tick` is called often enough. The
output is counted while it is generated, and jinja2 bounds `range`. One filter or method that is asked for gigabytes by
itself (`join`, `center`, `format`) is not stopped.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
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

# How long a template may run, and how many characters (or entries of a list) it may produce.
MAX_SECONDS = 5.0
MAX_CHARACTERS = 2**25
_MAX_POWER_BITS = 4096
# A width or precision of a format that is large, or taken from a value.
_WIDE_FORMAT = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{5}|\d*\.(\*|\d{5}))")

_deadline: ContextVar[float] = ContextVar("deadline of the template that runs")


def render(text: str, variables: Mapping[str, object], name: str, keep_last_newline: bool = False) -> str:
    """The text that a template renders from variables.

    name: of the template, for messages. keep_last_newline: False drops the template's own, as transformers does.

    Raises:
        InvalidRequest: the template does not compile, raises, or exceeds a bound.
    """
    template = _compiled(text, name, keep_last_newline)
    token = _deadline.set(time.monotonic() + MAX_SECONDS)
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


@dataclass(frozen=True, slots=True)
class Contents:
    """How a chat template reads the content of a message.

    parts: as a list of parts. wrapped: a plain text is made a list of one part, since the template cannot read it bare.
    """

    parts: bool
    wrapped: bool


@lru_cache(maxsize=64)
def contents_of(template: str, name: str) -> Contents:
    """How a template reads contents: as parts where it loops over one, which is how vLLM decides it too.

    name: of the template, for messages.

    Raises:
        InvalidRequest: the template does not compile.
    """
    tree = syntax_tree(template, name)
    names = _Names(tree)
    parts = any("content" in names.meanings_of(loop.iter) for loop in tree.find_all(nodes.For))
    bare = any(
        test.name == "string" and "content" in names.meanings_of(test.node) for test in tree.find_all(nodes.Test)
    )
    return Contents(parts, wrapped=not bare)


def syntax_tree(text: str, name: str) -> nodes.Template:
    """The syntax tree of a template, as it was written.

    Raises:
        InvalidRequest: the template does not compile.
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
    """jinja2's sandbox, which bounds `range` and hides Python's internals, with bounded operators."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    _check_size(len(value) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MAX_POWER_BITS:
                raise SecurityError("a power is too large.")
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError("a format asks for too wide a text.")
        result = super().call_binop(context, operator, left, right)
        if operator == "+" and isinstance(result, str | list | tuple):
            _check_size(len(result))
        return result

    def tick(self) -> str:
        """One round of a loop, or one call of a macro."""
        if time.monotonic() > _deadline.get():
            raise SecurityError(f"it ran for more than {MAX_SECONDS:g} seconds.")
        return ""

    def joined(self, *parts: object) -> str:
        """The result of `~`."""
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
    """`{% generation %}`, which marks the assistant's text for training; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _PlainNamespace(Namespace):
    """jinja2's namespace without names of Python's internals."""

    def __init__(self, /, *values: Any, **named: Any) -> None:
        super().__init__()
        for name, value in dict(*values, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}.")
        super().__setitem__(name, value)


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=line)


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"it makes more than {MAX_CHARACTERS} characters.")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _dict(*values: Any, **named: Any) -> dict[Any, Any]:
    """A function instead of the class `dict`, whose attributes a template could reach."""
    return dict(*values, **named)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class _Names:
    """Which names of a template may hold all messages, one message, or the content of one.

    Assignments are followed until no name gets a further meaning.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._meanings: dict[str, frozenset[str]] = {"messages": frozenset(("messages",))}
        self._macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        grows = True
        while grows:
            before = dict(self._meanings)
            for loop in tree.find_all(nodes.For):
                self._add(loop.target, self._items(loop.iter))
            for assignment in tree.find_all(nodes.Assign):
                self._add(assignment.target, self.meanings_of(assignment.node))
            for call in tree.find_all(nodes.Call):
                self._pass(call)
            grows = before != self._meanings

    def meanings_of(self, expression: nodes.Node | None) -> frozenset[str]:
        """What an expression may hold."""
        if isinstance(expression, nodes.Name):
            return self._meanings.get(expression.name, frozenset())
        if isinstance(expression, nodes.Filter):
            return self.meanings_of(expression.node)
        if isinstance(expression, nodes.CondExpr):
            return self.meanings_of(expression.expr1) | self.meanings_of(expression.expr2)
        if isinstance(expression, nodes.Or):
            return self.meanings_of(expression.left) | self.meanings_of(expression.right)
        if isinstance(expression, nodes.Getattr | nodes.Getitem):
            return self._part(expression)
        return frozenset()

    def _part(self, expression: nodes.Getattr | nodes.Getitem) -> frozenset[str]:
        """What an attribute, an item or a slice may hold."""
        key: object = expression.attr if isinstance(expression, nodes.Getattr) else expression.arg
        if isinstance(key, nodes.Slice):
            return self.meanings_of(expression.node)
        if isinstance(key, nodes.Const):
            key = key.value
        if not isinstance(key, str):
            return self._items(expression.node)
        if key == "content" and "message" in self.meanings_of(expression.node):
            return frozenset(("content",))
        holder = expression.node.name if isinstance(expression.node, nodes.Name) else None
        return self._meanings.get(f"{holder}.{key}", frozenset())

    def _items(self, expression: nodes.Node) -> frozenset[str]:
        return frozenset(("message",)) if "messages" in self.meanings_of(expression) else frozenset()

    def _add(self, target: nodes.Node, meanings: frozenset[str]) -> None:
        if isinstance(target, nodes.Name):
            name = target.name
        elif isinstance(target, nodes.NSRef):
            name = f"{target.name}.{target.attr}"
        else:
            return
        self._meanings[name] = self._meanings.get(name, frozenset()) | meanings

    def _pass(self, call: nodes.Call) -> None:
        """What a macro's arguments may hold."""
        macro = self._macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is None:
            return
        for target, value in zip(macro.args, call.args, strict=False):
            self._add(target, self.meanings_of(value))
        for named in call.kwargs:
            self._add(nodes.Name(named.key, "param"), self.meanings_of(named.value))
