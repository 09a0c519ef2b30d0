"""What the log and the reply say of each request, in every dialect, over a real socket."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.running import Running

# With a classifier beside an embedder, every dialect has something to answer with.
ENGINES = """engines = [
        FakeEngine("fake", tasks=("embed", "token_embed"), max_tokens=50),
        FakeEngine("labels", tasks=("classify", "token_classify"), label_names={0: "calm", 1: "angry"}),
    ]"""

TEXTS = ["one two", "three"]
RERANK = {"query": "one", "documents": TEXTS}
LABELS = {"input": TEXTS, "model": "labels"}

# path, body, model, items, tokens.
REQUESTS: list[tuple[str, dict[str, Any], str, int, int]] = [
    ("/v1/embeddings", {"input": TEXTS}, "fake", 2, 3),
    ("/pooling", {"input": TEXTS, "task": "token_embed"}, "fake", 2, 3),
    ("/classify", LABELS, "labels", 2, 3),
    ("/v1/score", {"text_1": "one", "text_2": TEXTS}, "fake", 3, 4),
    ("/v2/rerank", {**RERANK, "model": "fake"}, "fake", 3, 4),
    ("/v1/rerank", RERANK, "fake", 3, 4),
    ("/rerank", {"query": "one", "texts": TEXTS}, "fake", 3, 4),
    ("/embed", {"inputs": TEXTS}, "fake", 2, 3),
    ("/embed_all", {"inputs": TEXTS}, "fake", 2, 3),
    ("/predict", {"inputs": "one two", "model": "labels"}, "labels", 1, 2),
    ("/similarity", {"inputs": {"source_sentence": "one", "sentences": TEXTS}}, "fake", 3, 4),
    ("/vertex", {"instances": [{"inputs": "one two"}, {"inputs": "three"}]}, "fake", 2, 3),
    ("/tei/rerank", {"query": "one", "texts": TEXTS}, "fake", 3, 4),
    ("/v2/embed", {"texts": TEXTS, "input_type": "search_document", "model": "fake"}, "fake", 2, 3),
    ("/cohere/v1/rerank", RERANK, "fake", 3, 4),
    ("/v1/multi-vector", {"input": TEXTS}, "fake", 2, 3),
    ("/jina/v1/embeddings", {"input": TEXTS}, "fake", 2, 3),
    ("/v1/ranking", {"query": {"text": "one"}, "passages": [{"text": text} for text in TEXTS]}, "fake", 3, 4),
    ("/voyage/v1/embeddings", {"input": TEXTS}, "fake", 2, 3),
    ("/infinity/embeddings", {"input": TEXTS}, "fake", 2, 3),
    ("/infinity/classify", LABELS, "labels", 2, 3),
    ("/invocations", {"input": TEXTS}, "fake", 2, 3),
]


@pytest.fixture(scope="module")
def logged() -> dict[str, str]:
    """The lines of all requests in each format, by the number of the request and the format."""
    lines = {}
    for log_format in ("json", "text"):
        server = Running(ENGINES, log_format=log_format).ready()
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            for number, (path, body, *_) in enumerate(REQUESTS):
                reply = client.post(path, json=body, headers={"X-Request-Id": f"request-{number}"})
                assert reply.status_code == 200, (path, reply.text)
                assert reply.headers["x-request-id"] == f"request-{number}"
            body = {"input": "one two three", "truncate_prompt_tokens": 2}
            client.post("/v1/embeddings", json=body, headers={"X-Request-Id": "cut"})
            client.post("/v1/embeddings", json={"input": "w " * 99}, headers={"X-Request-Id": "long"})
            client.post("/v1/embeddings", content=b"{", headers={"X-Request-Id": "broken"})
        status, log = server.stop()
        assert status == 0, log
        for line in log.splitlines():
            found = re.search(r'request_id(?:":"|=)([a-z0-9-]+)', line)
            if found:
                lines[f"{found[1]} {log_format}"] = line
    return lines


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=[path for path, *_ in REQUESTS])
def test_a_line_says_model_items_and_tokens(logged: dict[str, str], number: int) -> None:
    path, _, model, items, tokens = REQUESTS[number]
    line = json.loads(logged[f"request-{number} json"])
    assert {name: line[name] for name in ("route", "status", "model", "items", "tokens")} == {
        "route": path, "status": 200, "model": model, "items": items, "tokens": tokens,
    }  # fmt: skip
    assert not {"truncated", "error_kind", "trace_id"} & set(line)
    text = logged[f"request-{number} text"]
    assert f" route={path} status=200 " in text
    assert text.endswith(f" model={model} items={items} tokens={tokens}")


def test_a_line_says_what_was_cut(logged: dict[str, str]) -> None:
    line = json.loads(logged["cut json"])
    assert (line["items"], line["tokens"], line["truncated"]) == (1, 2, 1)
    assert logged["cut text"].endswith(" model=fake items=1 tokens=2 truncated=1")


def test_a_line_says_of_what_kind_an_error_was(logged: dict[str, str]) -> None:
    line = json.loads(logged["long json"])
    assert (line["status"], line["model"], line["error_kind"]) == (400, "fake", "BadRequestError")
    assert "items" not in line
    assert logged["long text"].endswith(" model=fake error_kind=BadRequestError")
    assert json.loads(logged["broken json"])["error_kind"] == "Bad Request"
    assert logged["broken text"].endswith(" error_kind='Bad Request'")


def test_every_reply_shows_the_id_of_its_request(tmp_path: Path) -> None:
    load = f"while not __import__('os').path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n    {ENGINES}"
    server = Running(load, api_key="key", max_body_bytes=500, max_url_bytes=256, max_queued_prompts=1).listening()
    asked: list[tuple[int, int]] = []

    def ask(status: int, method: str, path: str, **options: Any) -> None:
        for given, kept in (("my-id", True), ("two words", False), (None, False)):
            headers = {"authorization": "Bearer key", **options.get("headers", {})}
            headers |= {} if given is None else {"x-request-id": given}
            reply = httpx.request(method, server.url + path, trust_env=False, **{**options, "headers": headers})
            shown = reply.headers.get_list("x-request-id")
            assert len(shown) == 1, (path, reply.headers)
            assert (shown == ["my-id"]) if kept else re.fullmatch("[0-9a-f]{32}", shown[0])
            asked.append((status, reply.status_code))

    ask(503, "POST", "/v1/embeddings", json={"input": "x"})
    ask(503, "GET", "/health/ready")
    ask(200, "GET", "/health/live")
    (tmp_path / "go").touch()
    server.ready()
    ask(200, "POST", "/v1/embeddings", json={"input": "x"})
    ask(200, "GET", "/health")
    ask(200, "GET", "/metrics")
    ask(400, "POST", "/v1/embeddings", content=b"{", headers={"content-type": "application/json"})
    ask(400, "POST", "/v1/embeddings", json={"input": "w " * 99})
    ask(401, "POST", "/v1/embeddings", json={"input": "x"}, headers={"authorization": "Bearer other"})
    ask(404, "GET", "/nothing")
    ask(404, "POST", "/v1/embeddings", json={"input": "x", "model": "none"})
    ask(405, "DELETE", "/v1/embeddings")
    ask(413, "POST", "/v1/embeddings", json={"input": "x" * 999})
    ask(414, "GET", "/" + "x" * 300)
    status, log = server.stop()
    assert status == 0, log
    assert [got for _, got in asked] == [wanted for wanted, _ in asked]
