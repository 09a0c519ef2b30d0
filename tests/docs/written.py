"""What the documents take from the code: the file map of docs/architecture.md, the public names, the options, and excerpts
of files.

`python -m tests.docs.written` writes them (`make docs` does); `tests/docs/test_architecture.py` says when they are stale.
An excerpt is the block below `<!-- from: PATH -->`, a whole file, or `<!-- from: PATH#NAME -->`, a definition in it.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import poolhouse
from poolhouse.cli.options import JSON_OPTIONS, flag
from poolhouse.settings import ServerSettings, Settings, panel_of
from tests.docs.pages import PAGES, ROOT

SOURCE = ROOT / "src" / "poolhouse"
_MAP = re.compile(r"(<!-- map:begin -->\n).*(<!-- map:end -->)", re.DOTALL)
_PUBLIC = re.compile(r"(<!-- public:begin -->\n).*(<!-- public:end -->)", re.DOTALL)
_OPTIONS = re.compile(r"(<!-- options of (Settings|ServerSettings):begin -->\n).*?(<!-- options:end -->)", re.DOTALL)
_EXCERPT = re.compile(
    r"(?P<mark><!-- from: (?P<path>[^#>\s]+)(?:#(?P<name>\w+))? -->\n```python\n).*?^```$", re.MULTILINE | re.DOTALL
)


def written(text: str) -> str:
    """A page, with what it takes from the code of today."""
    text = _EXCERPT.sub(lambda found: f"{found['mark']}{_excerpt(found['path'], found['name'])}```", text)
    text = _PUBLIC.sub(lambda found: found[1] + _public() + found[2], text)
    text = _OPTIONS.sub(lambda found: found[1] + _options(_CLASSES[found[2]]) + found[3], text)
    return _MAP.sub(lambda found: found[1] + _map() + found[2], text)


def _excerpt(path: str, name: str | None) -> str:
    source = (ROOT / path).read_text(encoding="utf-8")
    if name is None:
        return source
    for node in ast.parse(source).body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if name in (getattr(node, "name", None), *names):
            return f"{ast.get_source_segment(source, node)}\n"
    raise LookupError(f"{path} has no {name}")


def _map() -> str:
    """A table per room: each file, and the one idea that it holds."""
    tables = [_table("At the top", "", sorted(path for path in SOURCE.glob("*.py") if path.stem != "__main__"))]
    for room in sorted(path.parent for path in SOURCE.glob("*/__init__.py")):
        files = sorted(room.rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path.name))
        tables.append(_table(f"`{room.name}/`", _idea(room / "__init__.py"), files[1:]))
    return "\n".join(tables)


def _public() -> str:
    """What `from poolhouse import ...` gives: each name with its arguments or fields, and the methods of `LLM`."""
    lines = []
    for name in sorted(poolhouse.__all__, key=str.lower):
        value = getattr(poolhouse, name)
        if not callable(value) or not hasattr(value, "__module__"):
            lines.append(name)
        elif inspect.isclass(value) and issubclass(value, Exception):
            lines.append(f"{name}({', '.join(base.__name__ for base in value.__bases__)})")
        elif not str(value.__module__).startswith("poolhouse"):
            # An alias of types, or a class of another library.
            lines.append(name)
        else:
            lines += _called(name, value)
        if name == "LLM":
            methods = inspect.getmembers(value, inspect.isfunction)
            lines += [
                f"    {line}" for method, f in methods if not method.startswith("_") for line in _called(method, f)
            ]
    return "\n```text\n" + "\n".join(lines) + "\n```\n\n"


def _called(name: str, value: Callable[..., object]) -> list[str]:
    """A name with its arguments and their defaults, without types."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name != "self"
    ]
    shown = re.sub(r" at 0x[0-9a-f]+|<factory>", "", str(inspect.Signature(parameters)))
    return textwrap.wrap(name + shown, 112, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


_CLASSES: dict[str, type[BaseModel]] = {"Settings": Settings, "ServerSettings": ServerSettings}


def _options(settings: type[BaseModel]) -> str:
    """A table per panel of `--help`: the flag of each option, its values, its default, and its help text."""
    panels: dict[str, str] = {}
    for name, field in settings.model_fields.items():
        if name != "model":
            head = f"\n### {panel_of(field)}\n\n| option | values | default | meaning |\n|---|---|---|---|\n"
            row = (
                f"| `{flag(name)}` | {_values(name, field)} | {_default(field)} | {_cell(field.description or '')} |\n"
            )
            panels[panel_of(field)] = panels.get(panel_of(field), head) + row
    return "".join(panels.values()) + "\n"


_KINDS = {bool: "on, off", int: "whole number", float: "number", str: "text"}


def _values(name: str, field: FieldInfo) -> str:
    """What an option takes, in a few words."""
    if name in JSON_OPTIONS:
        return "JSON"
    kinds = [field.annotation] if get_origin(field.annotation) is Literal else get_args(field.annotation)
    if tuple in (get_origin(field.annotation), *map(get_origin, kinds)):
        return "several, with commas"
    words = [
        _codes(get_args(kind)) if get_origin(kind) is Literal else _KINDS.get(kind, "")
        for kind in kinds or [field.annotation]
    ]
    return ", ".join(filter(None, words)) or "text"


def _codes(values: tuple[object, ...]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _default(field: FieldInfo) -> str:
    if field.default in (None, "", ()):
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return _codes(field.default if isinstance(field.default, tuple) else (field.default,))


def _cell(text: str) -> str:
    """A sentence as a cell of a table, where no sign means anything to Markdown."""
    return re.sub(r"([|*<_])", r"\\\1", text) if "`" not in text else text.replace("|", "\\|")


def _table(title: str, idea: str, files: list[Path]) -> str:
    rows = [f"| `{path.relative_to(SOURCE)}` | {_idea(path)} |\n" for path in files]
    head = f"\n**{title}**" + (f": {idea}" if idea else "") + "\n"
    return head + ("\n| file | holds |\n|---|---|\n" + "".join(rows) if rows else "")


def _idea(path: Path) -> str:
    """The first line of a module's docstring."""
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert document, f"{path} has no docstring"
    return document.splitlines()[0].rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(written(text), encoding="utf-8")
