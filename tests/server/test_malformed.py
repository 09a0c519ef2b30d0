"""Bodies that nobody should send: every route says no in a documented shape, soon, and goes on answering."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.server.wire.body import _is_deep
from poolhouse.settings import ServerSettings
from tests.server.documented import TWINS, Document, checked
from tests.server.engines import every_kind

MODELS = ["embedder", "classifier", "tagger", "reranker", "splade"]
# Of all routes: what one route understands, another must refuse or ignore.
DOCUMENT = TestClient(create_app(every_kind())).get("/openapi.json").json()
FIELDS = sorted({name for kind in DOCUMENT["components"]["schemas"].values() for name in kind.get("properties", {})})
WORDS = [*MODELS, "float", "base64", "int8", "ubinary", "embed", "token_embed", "classify", "token_classify", "plugin"]
WORDS += ["weighted", "dense", "user", "text", "query", "END", "NONE", "START", "", "two words", "\x00", "word " * 600]

words = st.sampled_from(WORDS) | st.text(max_size=20)
numbers = st.sampled_from([0, 1, -1, 8, 255, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 10**40, 0.5, 1e308])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with TestClient(
        create_app(every_kind(), ServerSettings(max_client_batch_size=64)), raise_server_exceptions=False
    ) as client:
        yield client


@pytest.fixture(scope="module")
def document(http: TestClient) -> Document:
    return checked(http)


# Only here are warnings errors; a server logs them.
@pytest.mark.filterwarnings("ignore:Parameter `.*` was renamed:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The task `.*` was removed:DeprecationWarning")
@settings(
    max_examples=300, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_random_json_fails_no_server(http: TestClient, document: Document, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([*document.posts, *TWINS]))
    schema = body_schema(document, path)
    known = st.sampled_from(sorted(schema)) if schema else st.nothing()
    body = data.draw(st.dictionaries(known | st.sampled_from(FIELDS), values, max_size=6))
    body |= {
        name: data.draw(plausible)
        for name, plausible in PLAUSIBLE.items()
        if name in schema and data.draw(st.booleans())
    }
    assert ask(http, path, json.dumps(body).encode()) < 500


def body_schema(document: Document, path: str) -> dict[str, Any]:
    """The fields that a route knows, of all bodies that it tells apart."""
    schemas = document.content["components"]["schemas"]
    operation = document.content["paths"][document.told(path)]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    names = [part["$ref"].rpartition("/")[2] for part in schema.get("anyOf", [schema])]
    return {name: field for kind in names for name, field in schemas[kind]["properties"].items()}


texts = st.lists(words, min_size=1, max_size=3)
# What gets a body past the first checks, so that something is left to go wrong.
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(MODELS),
    "input": words | texts,
    "inputs": words | texts | st.fixed_dictionaries({"source_sentence": words, "sentences": texts}),
    "texts": texts,
    "documents": texts,
    "query": words,
    "queries": words,
    "passages": st.lists(st.fixed_dictionaries({"text": words}), min_size=1, max_size=3),
}


def ask(http: TestClient, path: str, content: bytes, kind: str = "application/json") -> int:
    """The status; the client holds the reply against the document."""
    started = time.monotonic()
    status = http.post(path, content=content, headers={"content-type": kind}).status_code
    assert time.monotonic() - started < 10
    return status


DEEP = b'{"input":' + b"[" * 40 + b"]" * 40 + b"}"
BODIES = {
    "nothing": b"",
    "null": b"null",
    "a number": b"7",
    "a list": b'["x"]',
    "an open object": b'{"input":',
    "no UTF-8": b'{"input":"\xff\xfe","inputs":"\xff"}',
    "a surrogate in UTF-8": b'{"input":"\xed\xa0\x80"}',
    "a number that is none": b'{"input":"x","priority":NaN}',
    "infinity": b'{"inputs":"x","weights":[Infinity]}',
    "two byte order marks": b'\xef\xbb\xbf\xef\xbb\xbf{"input":"x"}',
    "two values": b'{"input":"x"}{"input":"y"}',
    "single quotes": b"{'input':'x'}",
    "deep lists": DEEP,
    "deep objects": b'{"input":' + b'{"a":' * 40 + b"1" + b"}" * 41,
    "ten megabytes of brackets": b"[" * 10_000_000,
    "ten megabytes of pairs": b"[]" * 5_000_000,
    "a text that never ends": b"[]" * 40 + b'"' + b'\\"' * 2_000_000,
    "compressed bytes": b"\x1f\x8b\x08\x00\x00\x00",
    "zeros": bytes(1000),
}  # fmt: skip


@pytest.mark.parametrize("content", BODIES.values(), ids=BODIES)
def test_what_is_no_json_object_is_refused(http: TestClient, document: Document, content: bytes) -> None:
    heavy = len(content) > 1_000_000
    for path in ["/v1/embeddings", "/embed"] if heavy else [*document.posts, *TWINS]:
        assert ask(http, path, content) == 400
    assert ask(http, "/embed", b'{"inputs":"and on it goes"}') == 200


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", "\x7f"]
)
def test_another_content_type_is_refused(http: TestClient, document: Document, kind: str) -> None:
    for path in [*document.posts, *TWINS]:
        tei = document.content["paths"][document.told(path)]["post"]["tags"] == ["text-embeddings-inference"]
        assert ask(http, path, b'{"input":"x","inputs":"x"}', kind) == (415 if tei else 400)


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400])
@pytest.mark.parametrize(
    "field",
    [
        "priority",
        "dimensions",
        "truncate_prompt_tokens",
        "step_tag_id",
        "output_dimension",
        "top_n",
        "top_k",
        "max_tokens",
        "max_tokens_per_doc",
        "input",
        "inputs",
    ],
)
def test_a_huge_number_is_no_failure(http: TestClient, document: Document, field: str, number: int) -> None:
    for path in document.posts:
        body = {"input": "x", "inputs": "x", "texts": ["x"], "query": "x", "documents": ["x"], field: number}
        assert ask(http, path, json.dumps(body).encode()) < 500
    assert ask(http, "/v1/embeddings", json.dumps({"input": [number]}).encode()) == 400


@pytest.mark.parametrize(
    ("path", "start", "item", "end"),
    [
        ("/v2/embed", '{"texts":[', "1,", "1]}"),
        ("/embed", '{"inputs":[', '"",', '""]}'),
        ("/predict", '{"model":"classifier","inputs":[', '"a",', '"a"]}'),
        ("/v1/embeddings", '{"input":[', '"a",', "1]}"),
        ("/rerank", '{"query":"a","texts":[', "1,", "1]}"),
        ("/pooling", '{"input":"a","tasks":[', '"embed",', '"sing"]}'),
        ("/jina/v1/embeddings", '{"input":"a","embedding_type":[', '"flat",', '"flat"]}'),
        ("/classify_tokens", '{"input":"a","ignore_labels":[', "1,", "1]}"),
        ("/voyage/v1/embeddings", '{"input":[', "{},", "{}]}"),
        ("/weaviate/rerank", '{"query":"a","documents":[', "1,", "1]}"),
        ("/v1/encode/embedder", '{"items":[', "{},", "{}]}"),
        ("/v1/score/embedder", '{"query":{"text":"a"},"items":[', "{},", "{}]}"),
        # Right, but for their number.
        ("/v1/embeddings", '{"input":[', '"a",', '"a"]}'),
        ("/v1/embeddings", '{"input":[', "[1],", "[1]]}"),
        ("/pooling", '{"model":"embedder","input":[', '"a",', '"a"]}'),
        ("/classify", '{"model":"classifier","input":[', '"a",', '"a"]}'),
        ("/score", '{"model":"reranker","text_1":"a","text_2":[', '"a",', '"a"]}'),
        ("/v1/rerank", '{"model":"reranker","query":"a","documents":[', '"a",', '"a"]}'),
        ("/v2/rerank", '{"model":"reranker","query":"a","documents":[', '"a",', '"a"]}'),
        ("/v1/extract", '{"labels":["a"],"input":[', '"a",', '"a"]}'),
        ("/gliner", '{"labels":["a"],"texts":[', '"a",', '"a"]}'),
        ("/infinity/embeddings", '{"model":"embedder","input":[', '"a",', '"a"]}'),
        ("/infinity/rerank", '{"model":"reranker","query":"a","documents":[', '"a",', '"a"]}'),
        ("/jina/v1/embeddings", '{"input":[', '{"text":"a"},', '"a"]}'),
        ("/voyage/v1/embeddings", '{"input":[', '"a",', '"a"]}'),
        ("/api/embed", '{"model":"embedder","input":[', '"a",', '"a"]}'),
        ("/embedding", '{"content":[', '"a",', '"a"]}'),
        ("/v1/ranking", '{"model":"reranker","query":{"text":"a"},"passages":[', '{"text":"a"},', '{"text":"a"}]}'),
        ("/embed_sparse", '{"model":"splade","inputs":[', '"a",', '"a"]}'),
        ("/similarity", '{"inputs":{"source_sentence":"a","sentences":[', '"a",', '"a"]}}'),
        ("/v2/embed", '{"input_type":"search_query","texts":[', '"a",', '"a"]}'),
        ("/v2/embed", '{"input_type":"image","images":[', '"a",', '"a"]}'),
        ("/v1/encode/embedder", '{"items":[', '{"text":"a"},', '{"text":"a"}]}'),
        ("/voyage/v1/multimodalembeddings", '{"inputs":[', '{"content":[]},', '{"content":[]}]}'),
        ("/cohere/v2/rerank", '{"model":"reranker","query":"a","documents":[', '{"text":"a"},', '"a"]}'),
        ("/jina/v1/rerank", '{"model":"reranker","query":"a","documents":[', '{"text":"a"},', '"a"]}'),
        ("/weaviate/vectorize", '{"texts":[],"images":[', '"a",', '"a"]}'),
    ],
)
def test_many_items_too_many_do_not_hold_up_the_server(
    document: Document, path: str, start: str, item: str, end: str
) -> None:
    """The event loop calls Python for no item; what counts the names of a large body does so in a thread of its own."""

    async def ask(content: bytes) -> int:
        app = create_app(every_kind(), ServerSettings(max_client_batch_size=64))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            reply = await client.post(path, content=content, headers={"content-type": "application/json"})
        document.check(reply)
        return reply.status_code

    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    content = f"{start}{item * 200_000}{end}".encode()
    sys.setprofile(count)
    try:
        status = asyncio.run(ask(content))
    finally:
        sys.setprofile(None)
    assert 400 <= status < 500
    assert calls < 40_000


def test_a_batch_of_bodies_is_bounded_as_any_other(http: TestClient, document: Document) -> None:
    assert ask(http, "/vertex", json.dumps({"instances": [{"inputs": "a"}] * 65}).encode()) == 422
    assert ask(http, "/vertex", json.dumps({"instances": [{"inputs": "a"}] * 64}).encode()) == 200


@given(st.text('[]{}"\\a,', max_size=60))
def test_nesting_is_counted_outside_of_texts(text: str) -> None:
    depth, deepest, inside, escaped = 0, 0, False, False
    for letter in text:
        if inside:
            inside, escaped = escaped or letter != '"', not escaped and letter == "\\"
        elif letter == '"':
            inside = True
        else:
            depth += (letter in "[{") - (letter in "]}")
            deepest = max(deepest, depth)
    assert _is_deep(text.encode(), 2) == (deepest > 2)
