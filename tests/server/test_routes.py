"""Routes: the table of docs/server.md names each, and what requests meet on the way to one."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.server.call import Call
from poolhouse.server.dialects import DIALECTS
from poolhouse.server.routing import Dialect, Dispatch, Route
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.documented import checked

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "server.md"


def routes_of(app: Any) -> Iterator[tuple[str, str]]:
    """Method and path of each route of a server, hidden ones too."""
    while not isinstance(app, Dispatch):
        app = app.app
    yield from ((endpoint.route.method, endpoint.openapi_path) for endpoint in app.endpoints)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """The cells of the table's rows."""
    section = PAGE.read_text(encoding="utf-8").split("## Routes\n", 1)[1].split("\n## ", 1)[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"(GET|POST|DELETE)(, (GET|POST|DELETE))*", cells[0]):
            methods, paths, dialect, words = cells
            yield methods, paths, dialect, words


def test_the_table_names_every_route_once() -> None:
    served = sorted(routes_of(create_app([FakeEngine()])))
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
        *(
            "Poolhouse",
            "vLLM",
            "OpenAI",
            "OpenAI, vLLM",
            "vLLM, TEI",
            "vLLM, TEI, Voyage, Cohere, Weaviate",
            "every one",
            "TEI",
        ),
        *("Cohere, vLLM", "Cohere", "Jina", "Voyage", "Infinity", "NVIDIA"),
        *("Ollama", "llama.cpp", "llama.cpp, OpenAI", "Azure", "Weaviate", "SIE", "GLiNER"),
    }
    assert all(words for _, _, _, words in rows())


def test_the_dialect_of_contributing_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a dialect\n", 1)[1]
    (tmp_path / "plain_dialect.py").write_text(section.split("```python\n", 1)[1].split("```", 1)[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    plain = importlib.import_module("plain_dialect")
    with TestClient(create_app([FakeEngine(max_tokens=3)], dialects=(*DIALECTS, plain.DIALECT))) as http:
        checked(http)
        reply = http.post("/plain", json={"texts": ["a", "b c"]}).json()
        assert [len(item["vector"]) for item in reply["data"]] == [8, 8]
        assert reply["usage"]["total_tokens"] == 3
        for body, words in (({}, "texts: Field required"), ({"texts": ["a", "b c d e"]}, "texts[1]: The limit is 3")):
            refused = http.post("/plain", json=body)
            assert refused.status_code == 400
            assert words in refused.json()["wrong"]


def test_a_path_that_holds_a_model_is_suggested_too() -> None:
    with TestClient(create_app([FakeEngine()])) as http:
        refused = http.post("/openai/deployments/m/embedding", json={})
    assert refused.status_code == 404
    assert "Did you mean '/openai/deployments/{deployment}/embeddings'?" in refused.text


def test_the_time_of_a_request_begins_when_its_body_is_there() -> None:
    moments: list[float] = []

    async def read(http: Request, _: ServerSettings) -> dict[str, object]:
        await http.body()
        moments.append(time.perf_counter())
        return {}

    async def answer(call: Call, _: object) -> Response:
        moments.append(call.started)
        return Response()

    dialect = Dialect("timed", (Route("POST", "/timed", answer, (), read=read),))
    with TestClient(create_app([FakeEngine()], dialects=(dialect,))) as http:
        assert http.post("/timed", json={}).status_code == 200
    assert moments == sorted(moments)
