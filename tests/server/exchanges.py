"""Golden exchanges: a file of requests and replies per dialect, recorded from engines without a model.

`python -m tests.server.exchanges` asks every request of the files again and writes what comes back. Read the difference
before you keep it: what changes there changes for every client.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from starlette.testclient import TestClient

import poolhouse
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.tasks import SparseHead
from poolhouse.testing import FakeEngine
from tests.server.documented import checked

FOLDER = Path(__file__).parent / "golden"
DIALECTS = (
    *("tei", "vllm", "cohere_v1", "cohere_v2", "jina", "voyage", "infinity", "nvidia"),
    *("ollama", "llama_cpp", "azure", "weaviate", "sie"),
)

# Headers that are part of a dialect; all others are the server's own.
_HEADERS = re.compile(
    r"content-type|metadata|retry-after|x-(compute|total|tokenization|queue|inference)-.*|x-poolhouse-.*"
)
_TIMES = re.compile(r"x-(compute|total|tokenization|queue|inference)-time")
_CLOCKS = ("created", "unix", "modified_at", "total_duration", "last_used")
_ID = re.compile(r"^([a-z-]+)-[0-9a-f-]{16,36}$")


@contextmanager
def client() -> Iterator[TestClient]:
    """A server of six models: vectors, a reranker, a classifier, SPLADE, BGE-M3's three answers, and one for pictures."""
    engines = [
        FakeEngine("vectors", prompts={"query": "query: ", "document": "document: "}, dimensions=(4, 8), max_tokens=9),
        FakeEngine("reranker", tasks=("classify",), label_names={0: "LABEL_0"}),
        FakeEngine("labels", tasks=("classify",), label_names={0: "calm", 1: "angry", 2: "glad"}),
        FakeEngine("splade", sparse=SparseHead("embed", "vocabulary", 8)),
        FakeEngine(
            "m3",
            tasks=("embed", "token_embed", "token_classify"),
            sparse=SparseHead("token_classify", "token", 2**32),
        ),
        FakeEngine("pages", pictures=True),
    ]
    with TestClient(create_app(engines, ServerSettings(max_client_batch_size=4))) as http:
        checked(http)
        yield http


def ask(http: TestClient, request: dict[str, Any]) -> dict[str, Any]:
    """What comes back, with what differs from one time to the next masked."""
    reply = http.request(request["method"], request["path"], json=request.get("body"))
    headers = {name: _masked_header(name, text) for name, text in reply.headers.items() if _HEADERS.fullmatch(name)}
    return {"status": reply.status_code, "headers": dict(sorted(headers.items())), "body": masked(_body(reply))}


def masked(value: Any, key: str = "") -> Any:
    """The value without ids, times and versions."""
    if isinstance(value, dict):
        return {name: masked(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [masked(inner) for inner in value]
    if key == "id" and isinstance(value, str) and _ID.match(value):
        return _ID.sub(r"\1-<id>", value)
    if key in _CLOCKS or key.endswith("_ms"):
        return "<time>"
    return "<version>" if key == "version" and value == poolhouse.__version__ else value


def differences(expected: Any, got: Any, place: str = "") -> Iterator[str]:
    """Where a reply is not the recorded one; numbers may differ in their last digits, as processors do."""
    if isinstance(expected, dict) and isinstance(got, dict):
        if list(expected) != list(got):
            yield f"{place}: fields {list(got)}, not {list(expected)}"
        for name in expected.keys() & got.keys():
            yield from differences(expected[name], got[name], f"{place}.{name}")
    elif isinstance(expected, list) and isinstance(got, list):
        if len(expected) != len(got):
            yield f"{place}: {len(got)} items, not {len(expected)}"
        for index, (one, other) in enumerate(zip(expected, got, strict=False)):
            yield from differences(one, other, f"{place}[{index}]")
    elif type(expected) is not type(got) or not _same(expected, got):
        yield f"{place}: {got!r}, not {expected!r}"


def read(dialect: str) -> list[dict[str, Any]]:
    """The exchanges of a dialect: name, shape (of the body), request, response."""
    return json.loads((FOLDER / f"{dialect}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _same(expected: Any, got: Any) -> bool:
    if isinstance(expected, float):
        return bool(np.isclose(expected, got, rtol=1e-5, atol=1e-6))
    if isinstance(expected, str) and expected != got and len(expected) == len(got) >= 40:
        vectors = [_floats(text) for text in (expected, got)]
        return all(vector is not None for vector in vectors) and np.allclose(vectors[0], vectors[1], atol=1e-6)
    return bool(expected == got)


def _floats(text: str) -> Any:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except ValueError:
        return None


def _body(reply: httpx.Response) -> Any:
    if reply.headers.get("content-type") == "application/json":
        return reply.json()
    return base64.b64encode(reply.content).decode("ascii")


def _masked_header(name: str, text: str) -> Any:
    if _TIMES.fullmatch(name):
        return "<milliseconds>" if text.isdigit() else text
    return masked(json.loads(text)) if name == "metadata" else text


def _record() -> None:
    with client() as http:
        for dialect in DIALECTS:
            exchanges = read(dialect)
            for exchange in exchanges:
                exchange["response"] = ask(http, exchange["request"])
            text = json.dumps(exchanges, indent=1, ensure_ascii=False)
            # A list of numbers takes one line.
            flat = re.sub(r"\[\s+([-\d.eE+,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
            (FOLDER / f"{dialect}.json").write_text(flat + "\n", encoding="utf-8")


if __name__ == "__main__":
    _record()
