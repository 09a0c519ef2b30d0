"""The fenced code blocks of the documents, and what the pages say of them in comments that readers do not see.

`<!-- not run: REASON -->` before a block leaves it out, but for Python, which is compiled; `<!-- from: PATH -->` says that
it comes from that file, from which `tests/docs/written.py` writes it. `<!-- with: PACKAGE, ... -->` says that the Python of a
page needs packages which are not among those of the tests: `make test-stores` runs it, the other tests compile it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
)
# Programs whose commands `tests/deploy/test_documents.py` holds against the files of deploy/.
OF_CLUSTERS = ("docker", "helm", "kubectl")

_WITH = re.compile(r"^<!-- with: (.*) -->$", re.MULTILINE)
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>not run|from): (?P<value>[^>]*) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """line: of the page, where the text begins. mark: "not run", "from" or none; value: the reason, or the path."""

    page: str
    line: int
    language: str
    text: str
    mark: str | None
    value: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")) + 1,
            found["language"],
            dedent(found["text"]),
            found["mark"],
            (found["value"] or "").strip(),
        )
        for found in _BLOCK.finditer(text)
    ]


def packages(page: str) -> tuple[str, ...]:
    """The packages, by the names of their imports, that the Python of a page needs beside those of the tests."""
    found = _WITH.search((ROOT / page).read_text(encoding="utf-8"))
    return tuple(found[1].split(", ")) if found else ()


def commands(block: Block) -> list[tuple[list[str], str]]:
    """The command lines of a `sh` or `console` block as words, and what a `console` block shows below each.

    In a `console` block a command begins with "$ ", and ends with the line that closes its quotes.
    """
    found: list[tuple[list[str], str]] = []
    pending = ""
    for line in block.text.splitlines():
        starts = block.language == "sh" or line.startswith("$ ")
        if pending or starts:
            pending += line.removeprefix("$ ") + "\n"
            try:
                words = shlex.split(pending.replace("\\\n", " "), comments=block.language == "sh")
            except ValueError:
                continue  # an open quote
            if not line.endswith("\\"):
                pending = ""
                if words:
                    found.append((words, ""))
        else:
            words, output = found[-1]
            found[-1] = words, output + line + "\n"
    assert not pending, f"{block}: {pending!r} does not end"
    return found
