"""The server around engines that fail, wait and die, and around bodies that nobody should send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from poolhouse.errors import EngineError, NonFiniteResult
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("fake")


@pytest.fixture
def http(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app([engine], ServerSettings(max_body_bytes=1000)), raise_server_exceptions=False) as client:
        yield client


def both(message: str, kind: str, status: int, param: str | None = None) -> dict[str, Any]:
    problem = {"message": message, "type": kind, "param": param, "code": status}
    return {"object": "error", **problem, "error": problem}


def test_a_dead_engine_is_not_healthy_but_still_counted(engine: FakeEngine, http: TestClient) -> None:
    assert http.get("/health").status_code == 200
    engine.alive = False
    assert [http.get(path).status_code for path in ("/health", "/ping")] == [503, 503]
    assert [http.get(path).status_code for path in ("/metrics", "/version", "/v1/models")] == [200, 200, 200]
    reply = http.post("/v1/embeddings", json={"input": "x"})
    assert reply.status_code == 503
    assert reply.json() == both("The engine is shut down.", "ServiceUnavailableError", 503)
    assert 'route="/health",status="503"' in http.get("/metrics").text


def test_one_dead_engine_of_two_is_not_healthy() -> None:
    living, dead = FakeEngine("living"), FakeEngine("dead")
    dead.alive = False
    with TestClient(create_app([living, dead])) as http:
        assert http.get("/health").status_code == 503
        assert http.post("/v1/embeddings", json={"input": "x", "model": "living"}).status_code == 200


@pytest.mark.parametrize("failure", [EngineError("broken kernel"), NonFiniteResult("NaN in the answer")])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
def test_a_failing_engine_is_an_error_of_the_server(
    engine: FakeEngine, http: TestClient, path: str, failure: Exception
) -> None:
    engine.failure = failure
    reply = http.post(path, json={"input": ["one", "two"]})
    assert reply.status_code == 500
    assert reply.json() == both(str(failure), "InternalServerError", 500)
    engine.failure = None
    assert http.post(path, json={"input": "and on it goes"}).status_code == 200


def test_a_surprise_tells_nothing_of_the_inside(
    engine: FakeEngine, http: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failure = ZeroDivisionError("secret/path.py")
    reply = http.post("/v1/embeddings", json={"input": "x"})
    assert reply.json() == both("The server failed on this request; its log says why.", "InternalServerError", 500)
    assert "secret/path.py" in caplog.text
    assert 'route="/v1/embeddings",status="500"' in http.get("/metrics").text


def test_the_model_of_a_request_selects_the_engine() -> None:
    small, large = FakeEngine("small", width=4), FakeEngine("large", width=16)
    with TestClient(create_app([small, large])) as http:

        def width(**model: str) -> tuple[int, str]:
            reply = http.post("/v1/embeddings", json={"input": "x", **model}).json()
            return len(reply["data"][0]["embedding"]), reply["model"]

        assert width(model="small") == (4, "small")
        assert width(model="large") == (16, "large")
        assert width() == width(model="") == (4, "small")
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["small", "large"]
        reply = http.post("/v1/embeddings", json={"input": "x", "model": "middle"})
        assert reply.json() == both(
            "The model `middle` does not exist. Served models: small, large.", "NotFoundError", 404
        )
    assert not small.alive
    assert not large.alive


def test_a_task_that_a_model_lacks_is_said_with_the_models_that_have_it() -> None:
    """In every dialect; one model needs no such words."""
    engines = [FakeEngine("labels", tasks=("classify",)), FakeEngine("vectors", tasks=("embed", "token_embed"))]
    told = "Served models and their tasks: `labels`: classify; `vectors`: embed, token_embed."
    with TestClient(create_app(engines)) as http:
        for path, body in (
            ("/v1/embeddings", {"input": "x"}),
            ("/pooling", {"input": "x", "task": "embed"}),
            ("/classify", {"input": "x", "model": "vectors"}),
            ("/cohere/v2/embed", {"texts": ["x"], "input_type": "search_query"}),
            ("/jina/v1/embeddings", {"input": "x", "model": "labels"}),
            ("/tei/embed", {"inputs": "x"}),
            ("/infinity/classify", {"input": ["x"], "model": "vectors"}),
        ):
            reply = http.post(path, json=body)
            assert reply.status_code >= 400
            assert told in reply.text, reply.text
    with TestClient(create_app(engines[:1])) as http:
        assert "Served models" not in http.post("/v1/embeddings", json={"input": "x"}).text


def test_a_name_that_no_model_has_is_not_repeated_at_length() -> None:
    with TestClient(create_app([FakeEngine(f"model-{number}") for number in range(30)])) as http:
        message = http.post("/v1/embeddings", json={"input": "x", "model": "y" * 100_000}).json()["message"]
    assert len(message) < 1000
    assert "model-19 and 10 more" in message


def test_an_engine_without_embeddings_refuses_them_only() -> None:
    with TestClient(create_app([FakeEngine(tasks=("token_classify",))])) as http:
        reply = http.post("/v1/embeddings", json={"input": "x"})
        assert reply.status_code == 400
        assert reply.json()["message"] == "The model does not support Embeddings API"
        assert http.post("/pooling", json={"input": "two words"}).json()["data"][0]["object"] == "pooling"


SEED = (
    '{"object":"error","message":"Model \\"intfloat/multilingual-e5-small\\" does not support matryoshka representation, '
    'changing output dimensions will lead to poor results.","type":"BadRequestError","param":null,"code":400}'
)


def test_matryoshka_is_refused_in_the_bytes_of_the_seed_or_nested_or_both() -> None:
    body = {"input": "Follow the white rabbit.", "model": "intfloat/multilingual-e5-small", "dimensions": 1}
    problem = {name: value for name, value in json.loads(SEED).items() if name != "object"}
    expected = {
        "flat": SEED,
        "nested": json.dumps({"error": problem}, separators=(",", ":")),
        "both": SEED[:-1] + ',"error":' + json.dumps(problem, separators=(",", ":")) + "}",
    }
    for form, text in expected.items():
        settings = ServerSettings.parse(error_format=form)
        with TestClient(create_app([FakeEngine("intfloat/multilingual-e5-small")], settings)) as http:
            reply = http.post("/v1/embeddings", json=body)
            assert (reply.status_code, reply.text) == (400, text)
    assert ServerSettings().error_format == "both"


@pytest.mark.parametrize(
    ("content", "headers", "status", "message", "param"),
    [
        (b'{"input":"' + b"x" * 2000 + b'"}', {}, 413, "The body is larger than 1000 bytes", None),
        (b'{"input":"\xff\xfe"}', {}, 400, "The body is not valid JSON: byte 0xff at 10 is not UTF-8", "body.10"),
        (b'{"input":"\\ud80"}', {}, 400, "The body is not valid JSON", "body.10"),
        (b"\xef\xbb\xbf" * 2 + b'{"input":"x"}', {}, 400, "The body is not valid JSON", "body.0"),
        (b'{"input":' + b"[" * 31 + b"]" * 31 + b"}", {}, 400, "input[0][0] is list", "input[0][0]"),
        (b'{"input":' + b"[" * 32 + b"]" * 32 + b"}", {}, 400, "The body is nested deeper than 32 levels", "body"),
        (b"[" * 30 + b"]" * 30, {}, 400, "The body must be a JSON object", "body"),
        (b'"input"', {}, 400, "The body must be a JSON object", "body"),
        (b"{}", {"content-type": "text/plain"}, 400, "The content type must be application/json, got text/plain", None),
        (b"{}", {"content-type": ""}, 400, "The content type must be application/json, got none", None),
        (b'{"input":"x","dimensions":1e400}', {}, 400, "The body is not valid JSON", None),
        (b'{"input":[12345678901234567890123]}', {}, 400, "input[0] is float", "input[0]"),
        (b'{"input":[true]}', {}, 400, "input[0] is bool", "input[0]"),
        (b'{"input":[1,true]}', {}, 400, "input[1] is bool", "input[1]"),
        (b'{"input":[[1],[]]}', {}, 400, "input[1] is an empty list of token ids", "input[1]"),
        (b'{"input":"x","dimensions":true}', {}, 400, "dimensions", "body.dimensions"),
        (b'{"input":"x","model":["fake"]}', {}, 400, "model", "body.model"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_requests_get_one_clear_error(
    http: TestClient, content: bytes, headers: dict[str, str], status: int, message: str, param: str | None
) -> None:
    reply = http.post("/v1/embeddings", content=content, headers={"content-type": "application/json", **headers})
    body = reply.json()
    assert (reply.status_code, body["object"], body["code"]) == (status, "error", status)
    assert message in body["message"]
    if param is not None:
        assert body["param"] == param
    assert http.post("/v1/embeddings", json={"input": "and on it goes"}).status_code == 200


def test_brackets_within_a_text_are_no_nesting(http: TestClient) -> None:
    assert http.post("/v1/embeddings", json={"input": "[" * 300 + '\\" {' * 100}).status_code == 200


def test_a_body_that_grows_too_large_is_not_read_to_its_end(http: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 100
        pytest.fail("The whole body was read.")

    headers = {"content-type": "application/json"}
    app: ASGIApp = http.app
    source = pieces()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": next(source), "more_body": True}

    sent = asyncio.run(call(app, receive, headers))
    assert sent[0]["status"] == 413


def test_a_text_of_strange_characters_is_answered(http: TestClient) -> None:
    for text in ("", "\x00", "a\x00b", "\u202e\ufeff", "👩‍👩‍👧", "e\u0301"):
        assert http.post("/v1/embeddings", json={"input": text}).status_code == 200


def test_a_client_that_hangs_up_takes_its_prompts_out_of_the_queue(engine: FakeEngine) -> None:
    engine.open.clear()
    app = create_app([engine])
    body = json.dumps({"input": [f"text {n}" for n in range(5)]}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        while len(engine.received) < 5:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    sent = asyncio.run(asyncio.wait_for(call(app, receive, {"content-type": "application/json"}), 30))
    assert [request.future.cancelled() for request in engine.received] == [True] * 5
    assert [message.get("status") for message in sent if "status" in message] == [499]
    engine.close()


def test_a_request_that_is_cancelled_takes_its_prompts_out_of_the_queue(engine: FakeEngine) -> None:
    engine.open.clear()
    app = create_app([engine])
    body = json.dumps({"input": ["one", "two"]}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        return await asyncio.Future()

    async def give_up() -> None:
        serving = asyncio.ensure_future(call(app, receive, {"content-type": "application/json"}))
        while len(engine.received) < 2:
            await asyncio.sleep(0.001)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving

    asyncio.run(asyncio.wait_for(give_up(), 30))
    assert [request.future.cancelled() for request in engine.received] == [True, True]
    engine.close()


def test_the_first_bad_prompt_is_named_and_the_others_leave(engine: FakeEngine, http: TestClient) -> None:
    engine.describe(max_tokens=2)
    reply = http.post("/v1/embeddings", json={"input": ["fine", "one two three", "four five six"]})
    assert reply.json() == both("input[1]: The limit is 2 tokens, got 3.", "BadRequestError", 400, "input_tokens")


async def call(app: ASGIApp, receive: Any, headers: dict[str, str]) -> list[dict[str, Any]]:
    """POST /v1/embeddings as the socket's side of ASGI; what the application sent."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/embeddings",
        "raw_path": b"/v1/embeddings",
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)  # type: ignore[arg-type]
    return sent
