"""The file map of docs/architecture.md, made of the first lines of the modules' docstrings.

`python -m tests.docs.file_map` writes it (`make docs` does); `tests/docs/test_architecture.py` says when it is stale.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.docs.pages import ROOT

SOURCE = ROOT / "src" / "poolhouse"
PAGE = ROOT / "docs" / "architecture.md"
MARKS = re.compile(r"(<!-- map:begin -->\n).*(<!-- map:end -->)", re.DOTALL)


def file_map() -> str:
    """A table per room: each file, and the one idea that it holds."""
    tables = [_table("At the top", "", sorted(path for path in SOURCE.glob("*.py") if path.stem != "__main__"))]
    for room in sorted(path.parent for path in SOURCE.glob("*/__init__.py")):
        files = sorted(room.rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path.name))
        tables.append(_table(f"`{room.name}/`", _idea(room / "__init__.py"), files[1:]))
    return "\n".join(tables)


def _table(title: str, idea: str, files: list[Path]) -> str:
    rows = [f"| `{path.relative_to(SOURCE)}` | {_idea(path)} |\n" for path in files]
    head = f"\n**{title}**" + (f": {idea}" if idea else "") + "\n"
    return head + ("\n| file | holds |\n|---|---|\n" + "".join(rows) if rows else "")


def _idea(path: Path) -> str:
    """The first line of a module's docstring."""
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert document, f"{path} has no docstring"
    return document.splitlines()[0].rstrip(".").replace("|", "\\|")


def with_map(page: str) -> str:
    """The page, with the map of today."""
    return MARKS.sub(lambda found: found[1] + file_map() + found[2], page)


if __name__ == "__main__":
    PAGE.write_text(with_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
