"""Bodies and replies of every dialect that can be measured."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from poolhouse.bench.load import BACKENDS, Load, WrongReply, bodies, check_answers, said_by
from poolhouse.data import queries
from poolhouse.errors import ConfigError

Q = queries()[0]
VECTORS = [[0.5, 1.0], [1.0, 0.5]]
RANKED = [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]

# Backend, path, body of two items, a reply to them. From the contracts in the servers' own documentation.
ROUTES: list[tuple[str, str, dict[str, Any], Any]] = [
    ("openai-embeddings", "/v1/embeddings", {"input": ["a", "b"], "encoding_format": "float"}, {"data": VECTORS}),
    ("vllm-pooling", "/pooling", {"input": ["a", "b"], "encoding_format": "float"}, {"data": VECTORS}),
    ("vllm-classify", "/classify", {"input": ["a", "b"]}, {"data": VECTORS}),
    ("vllm-score", "/score", {"text_1": Q, "text_2": ["a", "b"]}, {"data": [{"score": 0.1}, {"score": 0.2}]}),
    ("vllm-rerank", "/rerank", {"query": Q, "documents": ["a", "b"]}, {"results": RANKED}),
    (
        "cohere-embed", "/v2/embed", {"texts": ["a", "b"], "embedding_types": ["float"]},
        {"embeddings": {"int8": None, "float": VECTORS}},
    ),
    ("cohere-rerank", "/v2/rerank", {"query": Q, "documents": ["a", "b"]}, {"results": RANKED}),
    ("jina-embeddings", "/v1/embeddings", {"input": ["a", "b"]}, {"data": VECTORS}),
    (
        "jina-rerank", "/v1/rerank", {"query": Q, "documents": ["a", "b"], "return_documents": False},
        {"results": RANKED},
    ),
    ("voyage-embeddings", "/v1/embeddings", {"input": ["a", "b"]}, {"data": VECTORS}),
    ("voyage-rerank", "/v1/rerank", {"query": Q, "documents": ["a", "b"]}, {"data": RANKED}),
    ("tei-embed", "/embed", {"inputs": ["a", "b"]}, VECTORS),
    ("tei-embed-sparse", "/embed_sparse", {"inputs": ["a", "b"]}, [[{"index": 1, "value": 0.5}], []]),
    ("tei-predict", "/predict", {"inputs": [["a"], ["b"]]}, [[{"label": "x", "score": 1.0}], []]),
    ("tei-rerank", "/rerank", {"query": Q, "texts": ["a", "b"]}, [{"index": 0, "score": 0.5}] * 2),
    ("infinity-embeddings", "/embeddings", {"input": ["a", "b"], "encoding_format": "float"}, {"data": VECTORS}),
    ("infinity-classify", "/classify", {"input": ["a", "b"]}, {"data": [[], []]}),
    ("infinity-rerank", "/rerank", {"query": Q, "documents": ["a", "b"]}, {"results": RANKED}),
    (
        "nvidia-ranking", "/v1/ranking", {"query": {"text": Q}, "passages": [{"text": "a"}, {"text": "b"}]},
        {"rankings": [{"index": 0, "logit": 1.0}, {"index": 1, "logit": 0.0}]},
    ),
]  # fmt: skip


def test_every_backend_is_tested() -> None:
    assert [row[0] for row in ROUTES] == list(BACKENDS)


@pytest.mark.parametrize(("name", "path", "body", "reply"), ROUTES, ids=[row[0] for row in ROUTES])
def test_a_backend_asks_and_counts_as_its_server_does(name: str, path: str, body: dict[str, Any], reply: Any) -> None:
    load = Load(backend=name, items_per_request=2, requests=1, warmup=0)
    assert BACKENDS[name].path == path
    assert [orjson.loads(sent) for sent in bodies(load, ["a", "b"])] == [body]
    assert check_answers(BACKENDS[name], orjson.dumps(reply), 2) == 0
    with pytest.raises(WrongReply, match="holds 2 answers to 3 items"):
        check_answers(BACKENDS[name], orjson.dumps(reply), 3)
    for other in ({"message": "no"}, [], "text", None, {"data": 5}, {"embeddings": {"float": None}}):
        with pytest.raises(WrongReply):
            check_answers(BACKENDS[name], orjson.dumps(other), 2)
    with pytest.raises(WrongReply, match="no JSON; it begins with b'<html>'"):
        check_answers(BACKENDS[name], b"<html>", 2)


def test_tokens_are_counted_where_the_reply_counts_them() -> None:
    backend = BACKENDS["openai-embeddings"]
    assert check_answers(backend, b'{"data":[[1]],"usage":{"prompt_tokens":7,"total_tokens":7}}', 1) == 7
    assert check_answers(backend, b'{"data":[[1]],"usage":null}', 1) == 0
    assert check_answers(backend, b'{"data":[[1]],"usage":{"total_tokens":null}}', 1) == 0


def test_a_single_text_stands_alone_and_all_texts_are_used_in_turn() -> None:
    load = Load(requests=3, warmup=1, model="m", extra={"dimensions": 64})
    sent = [orjson.loads(body) for body in bodies(load, ["a", "b", "c"])]
    assert [body.pop("input") for body in sent] == ["a", "b", "c", "a"]
    assert sent == [{"model": "m", "encoding_format": "float", "dimensions": 64}] * 4


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("openai-embeddings", {"encoding_format": "base64"}),
        ("cohere-embed", {"embedding_types": ["base64"]}),
        ("jina-embeddings", {"embedding_type": "base64"}),
        ("voyage-embeddings", {"encoding_format": "base64"}),
    ],
)
def test_base64_is_asked_for_in_each_dialect(name: str, field: dict[str, Any]) -> None:
    load = Load(backend=name, requests=1, warmup=0, encoding="base64")
    (body,) = (orjson.loads(body) for body in bodies(load, ["a"]))
    assert field.items() <= body.items()


def test_base64_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="tei-embed has no base64; these have: openai-embeddings"):
        bodies(Load(backend="tei-embed", encoding="base64"), ["a"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"object":"error","message":"too long","code":400}', "too long"),
        (b'{"error":{"message":"too long","code":400}}', "too long"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"error":"too long","error_type":"Validation"}', "too long"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"detail":[{"loc":["input"]}]}', "[{'loc': ['input']}]"),
        (b"{}", "{}"),
        (b"Bad Gateway\n", "Bad Gateway"),
        (b"", ""),
        (b"\xff" * 1000, "\ufffd" * 300),
    ],
)
def test_what_a_failure_says_is_found_in_every_dialect(body: bytes, said: str) -> None:
    assert said_by(body) == said
