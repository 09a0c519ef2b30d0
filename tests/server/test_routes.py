"""The table of docs/server.md names every route, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from poolhouse.server.app import create_app
from poolhouse.testing import FakeEngine

PAGE = Path(__file__).parent.parent.parent / "docs" / "server.md"


def routes_of(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Method and path of each, hidden ones too."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from routes_of(route.original_router.routes)
        else:
            # What answers GET answers HEAD.
            path = getattr(route, "path_format", route.path)
            yield from ((method, path) for method in route.methods - {"HEAD"})


def rows() -> Iterator[tuple[str, str, str, str]]:
    """The cells of the table's rows."""
    section = PAGE.read_text(encoding="utf-8").split("## Routes\n", 1)[1].split("\n## ", 1)[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"(GET|POST)(, (GET|POST))*", cells[0]):
            methods, paths, dialect, words = cells
            yield methods, paths, dialect, words


def test_the_table_names_every_route_once() -> None:
    app: Any = create_app([FakeEngine()])
    while not isinstance(app, FastAPI):
        app = app.app
    served = sorted(routes_of(app.routes))
    named = sorted(
        (method, path)
        for methods, paths, _, _ in rows()
        for method in methods.split(", ")
        for path in re.findall(r"`(/[^`]*)`", paths)
    )
    assert named == served
    assert len(set(served)) == len(served)


def test_every_row_says_whose_words_a_route_speaks() -> None:
    dialects = {dialect for _, _, dialect, _ in rows()}
    assert dialects == {
        *("Poolhouse", "vLLM", "OpenAI, vLLM", "vLLM, TEI", "vLLM, TEI, Voyage, Cohere, Weaviate", "every one", "TEI"),
        *("Cohere, vLLM", "Cohere", "Jina", "Voyage", "Infinity", "NVIDIA"),
        *("Ollama", "llama.cpp", "llama.cpp, OpenAI", "Azure", "Weaviate", "SIE"),
    }
    assert all(words for _, _, _, words in rows())
