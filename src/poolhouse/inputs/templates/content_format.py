"""What a chat template expects of a message's content: a text, or a list of parts.

A template that goes through a content in a loop reads parts; vLLM tells them apart likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from jinja2 import nodes

from poolhouse.inputs.templates.sandbox import syntax_tree


@dataclass(frozen=True, slots=True)
class Contents:
    """parts: contents go in as lists of parts. wrapped: texts too, since the template cannot read them bare."""

    parts: bool
    wrapped: bool


@lru_cache(maxsize=64)
def contents_of(template: str, name: str) -> Contents:
    """What the template reads. name: what to call it in messages.

    Raises:
        InvalidRequest: it does not compile.
    """
    tree = syntax_tree(template, name)
    known = _Names(tree)
    parts = any("content" in known.meant_by(loop.iter) for loop in tree.find_all(nodes.For))
    bare = any(test.name == "string" and "content" in known.meant_by(test.node) for test in tree.find_all(nodes.Test))
    return Contents(parts, wrapped=not bare)


class _Names:
    """Which names of a template may stand for all messages, one message, or the content of one."""

    def __init__(self, tree: nodes.Template) -> None:
        self._meanings: dict[str, frozenset[str]] = {"messages": frozenset(("messages",))}
        self._macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        grows = True
        while grows:
            before = dict(self._meanings)
            for loop in tree.find_all(nodes.For):
                self._add(loop.target, self._items(loop.iter))
            for assignment in tree.find_all(nodes.Assign):
                self._add(assignment.target, self.meant_by(assignment.node))
            for call in tree.find_all(nodes.Call):
                self._pass(call)
            grows = before != self._meanings

    def meant_by(self, expression: nodes.Node | None) -> frozenset[str]:
        """What an expression may stand for."""
        if isinstance(expression, nodes.Name):
            return self._meanings.get(expression.name, frozenset())
        if isinstance(expression, nodes.Filter):
            return self.meant_by(expression.node)
        if isinstance(expression, nodes.CondExpr):
            return self.meant_by(expression.expr1) | self.meant_by(expression.expr2)
        if isinstance(expression, nodes.Or):
            return self.meant_by(expression.left) | self.meant_by(expression.right)
        if isinstance(expression, nodes.Getattr | nodes.Getitem):
            return self._part(expression)
        return frozenset()

    def _part(self, expression: nodes.Getattr | nodes.Getitem) -> frozenset[str]:
        """What an attribute, an item or a slice may stand for."""
        key: object = expression.attr if isinstance(expression, nodes.Getattr) else expression.arg
        if isinstance(key, nodes.Slice):
            return self.meant_by(expression.node)
        if isinstance(key, nodes.Const):
            key = key.value
        if not isinstance(key, str):
            return self._items(expression.node)
        if key == "content" and "message" in self.meant_by(expression.node):
            return frozenset(("content",))
        holder = expression.node.name if isinstance(expression.node, nodes.Name) else None
        return self._meanings.get(f"{holder}.{key}", frozenset())

    def _items(self, expression: nodes.Node) -> frozenset[str]:
        return frozenset(("message",)) if "messages" in self.meant_by(expression) else frozenset()

    def _add(self, target: nodes.Node, meanings: frozenset[str]) -> None:
        if isinstance(target, nodes.Name):
            name = target.name
        elif isinstance(target, nodes.NSRef):
            name = f"{target.name}.{target.attr}"
        else:
            return
        self._meanings[name] = self._meanings.get(name, frozenset()) | meanings

    def _pass(self, call: nodes.Call) -> None:
        """What a macro's arguments may stand for."""
        macro = self._macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is None:
            return
        for target, value in zip(macro.args, call.args, strict=False):
            self._add(target, self.meant_by(value))
        for named in call.kwargs:
            self._add(nodes.Name(named.key, "param"), self.meant_by(named.value))
