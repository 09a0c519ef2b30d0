"""The OpenAPI document, and whether the server does what it says."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from jsonschema_rs import Draft202012Validator
from pydantic import SecretStr
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from tests.server.documented import TWINS, Document, checked
from tests.server.engines import every_kind
from tests.server.exchanges import masked

MODELS = ["embedder", "classifier", "tagger", "reranker", "splade", "pages", "nobody"]
CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance),
    *(response_schema_conformance, negative_data_rejection),
]


def always_open(app: ASGIApp) -> ASGIApp:
    """The app without its lifespan: schemathesis starts and stops it for every call, and a stop closes the engines."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    return call


schema = schemathesis.openapi.from_asgi("/openapi.json", always_open(create_app(every_kind())))
# TEI refuses with 424 what a model cannot do, whatever else is wrong with the body.
schema.config.checks.negative_data_rejection.expected_statuses = ["400", "404", "413", "415", "422", "424"]


@schema.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Name served models instead of any words: of those would come nothing but 404."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        return {**body, "model": MODELS[len(body["model"]) % len(MODELS)]}
    return body


@schema.parametrize()
@settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_asked_the_answer_is_as_documented(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with TestClient(create_app(every_kind())) as client:
        checked(client)
        # The engine knows the words that it read.
        client.post("/tokenize", json={"prompt": "one"})
        yield client


@schema.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: Any) -> Any:
    return {name: MODELS[len(str(value)) % len(MODELS)] for name, value in (path_parameters or {}).items()}


ONE = [zlib.crc32(b"one")]
TEXTS = ["one", "two words", "one"]
PNG = "data:image/png;base64,iVBORw0KGgo="
PICTURE = {"type": "image_url", "image_url": {"url": PNG}}
RERANK = {"query": "q", "documents": TEXTS}
REPLIES: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/embeddings", {"input": TEXTS, "encoding_format": form}) for form in ("float", "base64", "bytes", "bytes_only")),
    *(("/v1/embeddings", {"input": TEXTS, "embed_dtype": kind}) for kind in ("int8", "ubinary")),
    ("/v1/embeddings", {"input": ["a", "word " * 600], "truncate_prompt_tokens": -1}),
    ("/v1/embeddings", {"input": TEXTS, "late_chunking": True}),
    ("/v1/embeddings", {"input": TEXTS, "late_chunking_params": {"chunk_size": 2}}),
    *(("/v1/embeddings", {"input": TEXTS, "task": "token_embed", "encoding_format": form}) for form in ("float", "base64")),
    ("/pooling", {"input": TEXTS, "task": "token_embed", "late_chunking_params": {"chunk_size": 1}}),
    ("/v1/embeddings", {"messages": [{"role": "user", "content": "hello"}]}),
    ("/v1/embeddings", {"input": [{"prompt": "a"}, {"prompt_token_ids": [1, 2]}, [3], "b"]}),
    ("/pooling", {"input": TEXTS}),
    ("/pooling", {"input": TEXTS, "task": "token_embed", "return_tokens": True}),
    *(("/pooling", {"input": TEXTS, "task": task}) for task in ("token_embed", "token_classify")),
    *(("/pooling", {"input": TEXTS, "task": "token_embed", "encoding_format": form}) for form in ("base64", "bytes")),
    *(("/pooling", {"input": TEXTS, "tasks": ["embed", "token_embed"], "encoding_format": form}) for form in ("float", "base64")),
    ("/pooling", {"input": TEXTS, "model": "classifier"}),
    ("/classify", {"input": TEXTS, "model": "classifier"}),
    ("/classify", {"input": TEXTS, "model": "judge", "labels": ["good", "bad"], "multi_label": True}),
    ("/classify_tokens", {"input": TEXTS, "model": "tagger"}),
    ("/score", {"queries": "a", "documents": TEXTS}),
    ("/score", {"queries": "a", "documents": TEXTS, "mode": "sparse+dense"}),
    ("/rerank", RERANK),
    ("/rerank", {**RERANK, "model": "reranker", "truncate_prompt_tokens": 1}),
    ("/rerank", {"query": "q", "texts": TEXTS}),
    ("/rerank", {**RERANK, "top_k": 1}),
    ("/invocations", {"inputs": TEXTS}),
    ("/invocations", RERANK),
    *((f"{tei}/embed", {"inputs": TEXTS}) for tei in ("", "/tei")),
    *((f"{tei}/embed_all", {"inputs": TEXTS}) for tei in ("", "/tei")),
    *((f"{tei}/embed_sparse", {"inputs": TEXTS}) for tei in ("", "/tei")),
    ("/tokenize", {"prompt": "two words", "return_token_strs": True}),
    ("/tokenize", {"inputs": TEXTS}),
    ("/tei/tokenize", {"inputs": "a"}),
    ("/detokenize", {"tokens": ONE}),
    *((f"{tei}/decode", {"ids": ids}) for tei in ("", "/tei") for ids in (ONE, [ONE, ONE])),
    ("/pooling", {"input": TEXTS, "task": "sparse"}),
    ("/pooling", {"input": TEXTS, "tasks": ["sparse", "token_embed"], "encoding_format": "base64"}),
    *((f"{tei}/predict", {"inputs": inputs, "model": "classifier"}) for tei in ("", "/tei") for inputs in ("a", [["a"], ["b", "c"]])),
    *((f"{tei}/similarity", {"inputs": {"source_sentence": "a", "sentences": TEXTS}}) for tei in ("", "/tei")),
    ("/tei/rerank", {"query": "q", "texts": TEXTS, "return_text": True}),
    ("/tei/v1/embeddings", {"input": TEXTS}),
    *((f"{under}/v{version}/embed", {"texts": TEXTS}) for under in ("", "/cohere") for version in (1, 2)),
    ("/v1/embed", {"texts": TEXTS, "embedding_types": ["float", "int8", "uint8", "binary", "ubinary", "base64"]}),
    ("/cohere/v1/rerank", {**RERANK, "return_documents": True}),
    ("/cohere/v2/rerank", RERANK),
    ("/v2/embed", {"texts": ["a", "word " * 600]}),
    *((f"{jina}/v1/multi-vector", {"input": TEXTS}) for jina in ("", "/jina")),
    ("/jina/v1/embeddings", {"input": TEXTS, "embedding_type": ["float", "binary"]}),
    ("/jina/v1/embeddings", {"input": TEXTS, "late_chunking": True}),
    ("/jina/v1/embeddings", {"input": TEXTS, "return_multivector": True, "embedding_type": ["int8", "base64"]}),
    ("/jina/v1/rerank", RERANK),
    ("/v2/rerank", RERANK),
    ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": text} for text in TEXTS]}),
    ("/voyage/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"}),
    ("/voyage/v1/embeddings", {"input": TEXTS, "output_dtype": "binary"}),
    ("/voyage/v1/rerank", {**RERANK, "return_documents": True}),
    ("/infinity/embeddings", {"input": TEXTS}),
    ("/infinity/embeddings", {"input": TEXTS, "encoding_format": "base64"}),
    ("/infinity/rerank", RERANK),
    ("/infinity/classify", {"input": TEXTS, "model": "classifier"}),
    ("/rerank", {"query": "q", "documents": TEXTS}),
    ("/rerank", {"query": "q", "property": "a"}),
    ("/infinity/embeddings_image", {"input": PNG, "model": "pages"}),
    *((f"{under}/v1/multimodalembeddings", {"model": "pages", "inputs": [{"content": [{"type": "image_base64", "image_base64": PNG}, "a"]}]}) for under in ("", "/voyage")),
    *((f"{under}/vectorize", {"texts": TEXTS, "images": [PNG]}) for under in ("", "/weaviate")),
    ("/v2/embed", {"images": [PNG], "model": "pages"}),
    ("/v2/rerank", {"query": "q", "documents": [{"content": [PICTURE]}], "model": "pages"}),
    ("/jina/v1/rerank", {"query": {"image": PNG}, "documents": ["a", {"image": PNG}], "model": "pages"}),
    ("/v1/encode/pages", {"items": [{"images": [{"data": PNG}]}]}),
    ("/pooling", {"messages": [{"role": "user", "content": [PICTURE]}], "model": "pages"}),
    ("/api/embed", {"input": TEXTS, "options": {"num_ctx": 1}}),
    ("/api/embeddings", {"prompt": "a"}),
    ("/api/show", {}),
    *((path, {"content": TEXTS, "embd_normalize": size}) for path in ("/embedding", "/embeddings") for size in (-1, 0, 3)),
    ("/embeddings", {"input": TEXTS, "encoding_format": "bytes"}),
    ("/reranking", RERANK),
    ("/reranking", {"query": "q", "texts": TEXTS, "return_text": True}),
    ("/openai/v1/embeddings", {"input": TEXTS}),
    ("/openai/deployments/embedder/embeddings", {"input": TEXTS}),
    *((f"{under}/vectors", {"text": "a", "config": {"task_type": "query"}}) for under in ("", "/weaviate")),
    ("/weaviate/rerank", RERANK),
    ("/weaviate/rerank", {"query": "q", "property": "a"}),
    ("/v1/encode/embedder", {"items": [{"text": "a"}, {"id": "x", "text": "word " * 600}], "params": {"output_types": ["dense", "sparse", "multivector"]}}),
    *(("/v1/encode/embedder", {"items": [{"text": "a"}], "params": {"output_dtype": kind}}) for kind in ("float16", "int8", "uint8", "binary")),
    ("/v1/extract", {"input": ["one two", "word " * 600], "labels": ["two"], "model": "finder"}),
    ("/api/extract", {"input": "one two", "labels": {"two": ""}, "model": "finder"}),
    ("/api/extract", {"input": TEXTS, "labels": ["two"], "model": "finder"}),
    *(("/gliner", {"text": text, "labels": ["two"]}) for text in ("one two", ["one two", "word " * 600])),
    ("/v1/extract/finder", {"items": [{"text": "one two"}, {"id": "x", "text": "word " * 600}], "params": {"labels": ["two"]}}),
    ("/v1/encode/splade", {"items": [{"text": "a"}], "params": {"output_types": ["sparse"]}}),
    ("/v1/score/embedder", {"query": {"text": "q"}, "items": [{"text": text} for text in TEXTS], "options": {"score_mode": "hybrid"}}),
    ("/v1/retrieval/reranker/reranking", {"query": {"text": "q"}, "passages": [{"text": text} for text in TEXTS], "top_k": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), REPLIES, ids=lambda value: value if isinstance(value, str) else "")
def test_replies_are_as_documented(http: TestClient, path: str, body: dict[str, Any]) -> None:
    assert http.post(path, json=body).status_code == 200
    # Some dialects have no 404 for a model, Weaviate no name of one.
    unknown = 400 if re.match("/(voyage|jina|infinity)/|/v1/multi", path) or "top_k" in body else 404
    if path.startswith("/v1/retrieval"):
        unknown = 404
    elif path.endswith(("/vectors", "/vectorize", "/gliner")) or path == "/weaviate/rerank" or "property" in body:
        unknown = 200
    elsewhere = re.sub("/(embedder|splade|pages|finder)(?=/|$)", "/nobody", path)
    assert http.post(elsewhere, json={**body, "model": "nobody"}).status_code == unknown
    assert http.post(path, content=b"{", headers={"content-type": "application/json"}).status_code == 400


def fields_of(content: dict[str, Any], path: str) -> dict[str, Any]:
    """The schemas of all fields that a path reads, in any of its dialects."""
    known = TWINS.get(path, path)
    template = next(one for one in content["paths"] if re.fullmatch(re.sub("{.*?}", ".+", one), known))
    schema = content["paths"][template]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = [one["$ref"].rpartition("/")[2] for one in schema.get("anyOf", [schema])]
    return {
        name: field for kind in names for name, field in content["components"]["schemas"][kind]["properties"].items()
    }


def within(content: dict[str, Any], field: dict[str, Any]) -> list[str]:
    """The fields of the object that a field holds, where it holds one."""
    for one in field.get("anyOf", [field]):
        if "$ref" in one:
            kind = content["components"]["schemas"][one["$ref"].rpartition("/")[2]]
            return [name for name in kind["properties"] if name not in kind.get("required", ())]
    return []


TWO_PATHS = [(twin, body) for path, body in REPLIES for twin, told in TWINS.items() if told == path]
TWO_PATHS += [("/", {"query": "q", "texts": TEXTS}), ("/vertex", {"instances": [{"inputs": "a"}]})]


@pytest.mark.filterwarnings("ignore:Parameter `.*` was renamed:DeprecationWarning")
@pytest.mark.parametrize(
    ("path", "body"), [*REPLIES, *TWO_PATHS], ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_null_is_a_field_left_out(http: TestClient, path: str, body: dict[str, Any]) -> None:
    def told(asked: dict[str, Any]) -> tuple[int, Any]:
        reply = http.post(path, json=asked)
        in_json = reply.headers["content-type"] == "application/json"
        return reply.status_code, masked(reply.json()) if in_json else reply.content

    content = http.get("/openapi.json").json()
    fields = fields_of(content, path)
    expected = told(body)
    for name in fields:
        left_out = {other: value for other, value in body.items() if other != name}
        assert told(left_out | {name: None}) == (expected if name not in body else told(left_out)), name
    for name, field in fields.items():
        inner = body.get(name, {})
        for nested in within(content, field) if isinstance(inner, dict) else []:
            rest = {other: value for other, value in inner.items() if other != nested}
            assert told({**body, name: {**rest, nested: None}}) == told({**body, name: rest}), (name, nested)
    of_all = {name for kind in content["components"]["schemas"].values() for name in kind.get("properties", {})}
    assert told({**dict.fromkeys(sorted(of_all)), **body}) == expected
    if "instances" in body:
        nulls = dict.fromkeys(sorted(of_all))
        assert told({"instances": [{**nulls, **instance} for instance in body["instances"]]}) == expected


@pytest.mark.parametrize(
    ("field", "with_nulls", "without"),
    [
        ("input", {"prompt": "a", "prompt_token_ids": None, "multi_modal_data": None}, {"prompt": "a"}),
        ("input", {"prompt_token_ids": [1], "prompt": None, "messages": None, "cache_salt": None}, [1]),
        ("input", {"messages": [{"role": "user", "content": "a", "name": None}], "add_generation_prompt": None},
         {"messages": [{"role": "user", "content": "a"}]}),
        ("documents", [{"text": "a", "content": None}, {"content": [{"type": None, "text": "b"}], "text": None}], ["a", "b"]),
    ],
)  # fmt: skip
def test_a_null_within_a_prompt_is_one_too(http: TestClient, field: str, with_nulls: Any, without: Any) -> None:
    path, rest = ("/rerank", {"query": "q"}) if field == "documents" else ("/v1/embeddings", {})
    replies = [http.post(path, json={field: value, **rest}) for value in (with_nulls, without)]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert masked(replies[0].json()) == masked(replies[1].json())


def test_every_route_has_a_reply_above(http: TestClient) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    templates = {re.sub("/(embedder|splade|reranker|pages|finder)(?=/|$)", "/{}", path) for path, _ in REPLIES}
    assert templates == {re.sub("{.*}", "{}", path) for path, operations in paths.items() if "post" in operations}
    for path, operations in paths.items():
        if "get" in operations:
            assert http.get(path.replace("{model}", "embedder")).status_code == 200
    assert http.get("/info", params={"model": "nobody"}).json()["error_type"] == "Validation"


def document(settings: ServerSettings | None = None) -> dict[str, Any]:
    with TestClient(create_app(every_kind(), settings), headers={"x-api-key": "secret"}) as client:
        content: dict[str, Any] = client.get("/openapi.json").json()
    return content


def test_the_document_is_whole_and_names_are_short() -> None:
    content = document()
    text = str(content)
    schemas = content["components"]["schemas"]
    assert "$defs" not in text
    assert "poolhouse__" not in text
    assert {"TeiRerankFields", "CohereRerankFields", "JinaRerankFields", "VoyageRerankFields"} <= set(schemas)
    assert all(schemas[name].get("type") == "object" for name in schemas)
    for operations in content["paths"].values():
        for operation in operations.values():
            for part in (operation.get("requestBody", {}), *operation["responses"].values()):
                for kind in part.get("content", {}).values():
                    # Compiling resolves every reference.
                    Draft202012Validator({**kind.get("schema", {}), "components": content["components"]})


def test_every_status_that_a_route_may_have_is_there() -> None:
    paths = document()["paths"]
    ours = {"200", "400", "404", "408", "413", "414", "415", "422", "429", "431", "500", "503", "504"}
    assert set(paths["/v1/embeddings"]["post"]["responses"]) == ours
    assert set(paths["/embed"]["post"]["responses"]) == ours | {"424"}
    assert "Retry-After" in paths["/embed"]["post"]["responses"]["429"]["headers"]


@pytest.mark.parametrize(("form", "name"), [("both", "BothError"), ("flat", "FlatError"), ("nested", "NestedError")])
def test_errors_have_the_shape_that_the_server_was_started_with(form: Any, name: str) -> None:
    reply = document(ServerSettings(error_format=form))["paths"]["/pooling"]["post"]["responses"]["400"]
    assert reply["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}


def test_keys_and_a_prefix_are_told_where_there_are_some() -> None:
    open_to_all = document()
    assert "security" not in open_to_all
    assert open_to_all["servers"] == [{"url": "/"}]
    content = document(ServerSettings(api_key=(SecretStr("secret"),), root_path="/models"))
    assert content["security"] == [{"bearer": []}, {"x-api-key": []}, {"api-key": []}]
    assert set(content["components"]["securitySchemes"]) == {"bearer", "x-api-key", "api-key"}
    assert content["servers"] == [{"url": "/models"}]
    assert content["paths"]["/health"]["get"]["security"] == []
    assert "401" in content["paths"]["/pooling"]["post"]["responses"]


def test_a_refusal_of_the_guard_is_as_documented() -> None:
    with TestClient(
        create_app(every_kind(), ServerSettings(api_key=(SecretStr("secret"),), max_url_bytes=300))
    ) as client:
        shown = Document(client.get("/openapi.json", headers={"x-api-key": "secret"}).json())
        for reply in (client.post("/embed", json={"inputs": "a"}), client.get("/info", params={"model": "x" * 300})):
            assert reply.status_code in (401, 414)
            shown.check(reply)


def test_the_page_for_people_needs_nothing_from_elsewhere() -> None:
    with TestClient(create_app(every_kind(), ServerSettings(root_path="/models"))) as client:
        page = client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    # Every address on it is the document beside it, also behind a prefix, or made from a path of the document.
    assert "//" not in page.text.replace("// ", "")
    assert set(re.findall(r'(?:href|src|fetch)[=(: ]*"([^"]*)"', page.text)) == {"openapi.json", "data:,"}


def test_documents_can_be_left_out() -> None:
    with TestClient(create_app(every_kind())) as client:
        assert "openapi.json" in client.get("/docs").text
    with TestClient(create_app(every_kind(), ServerSettings(disable_fastapi_docs=True))) as client:
        assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/redoc")] == [404, 404, 404]
        assert client.post("/embed", json={"inputs": "a"}).status_code == 200
