"""docs/architecture.md and docs/glossary.md: the map, the drawing and the terms are those of the code."""

from __future__ import annotations

import re

import pytest

import poolhouse
from tests.docs.pages import PAGES, ROOT, Block, blocks
from tests.docs.written import written
from tests.test_layering import INSIDE, LINES, MODULES


def drawing(first: str) -> list[list[str]]:
    """The rooms of each line of a drawing, which stand before its explanation."""
    (block,) = (block for block in _drawings() if block.text.split()[0] == first)
    return [line.split("│")[0].split() for line in block.text.splitlines()]


def _drawings() -> list[Block]:
    return [block for block in blocks("docs/architecture.md") if block.language == "text" and "│" in block.text]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_takes_from_the_code_is_that_of_today(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert written(text) == text, f"{page} is stale: python -m tests.docs.written (or make docs) writes it."


@pytest.mark.parametrize("lines", [LINES, *INSIDE.values()], ids=["rooms", *INSIDE])
def test_the_drawing_is_that_of_the_layering_test(lines: list[list[str]]) -> None:
    assert [sorted(line) for line in drawing(lines[0][0])] == [sorted(line) for line in lines]


def test_files_and_modules_that_the_documents_name_exist() -> None:
    """Files of the source written as in `engine/queue.py`, and modules as in `poolhouse.testing`."""
    known = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("**/*.py") if ".venv" not in path.parts}
    short = {path.removeprefix("src/poolhouse/") for path in known} | known
    names = {path.split("/")[-1] for path in known}
    for page in (*PAGES, "SECURITY.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for path in re.findall(r"`([\w/]+\.py)`", text):
            # `.../x.py` is a file that the reader adds.
            assert path.endswith("/x.py") or path in (short if "/" in path else short | names), f"{page} names {path}"
        if page in ("docs/operations.md", "docs/server.md"):
            continue  # attributes of traces and keys of replies look like modules
        for name in re.findall(r"`(poolhouse(?:\.\w+)+)", text):
            module = name
            while module not in MODULES:
                module = module.rpartition(".")[0]
            # Beneath a module there is a name in it; `poolhouse` itself has few.
            assert module != "poolhouse" or hasattr(poolhouse, name.split(".")[1]), f"{page} names {name}"


def test_the_glossary_has_about_twenty_terms_whose_code_exists() -> None:
    rows = re.findall(
        r"^\| \*\*(.+?)\*\* \| .+ \| `([\w/.]+)` \|$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE
    )
    assert 18 <= len(rows) <= 26
    assert [term for term, _ in rows] == sorted((term for term, _ in rows), key=str.lower)
    for term, path in rows:
        assert (ROOT / "src" / "poolhouse" / path).exists(), f"{term}: {path}"
