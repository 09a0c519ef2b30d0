"""The server on a real socket, with the embedded model and real clients."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from poolhouse import LLM

MODEL = "all-MiniLM-L6-v2"


class Server:
    """`poolhouse serve` in a process of its own."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "poolhouse.cli",
                "serve",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--log-level",
                "warning",
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Poolhouse serves"), self.process.communicate()[1]
        self.url = line.rsplit(" ", 1)[1].strip()

    def stop(self) -> tuple[int, str]:
        """Exit status and what was logged."""
        self.process.send_signal(signal.SIGTERM)
        log = self.process.communicate(timeout=180)[1]
        return self.process.returncode, log


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--max-body-bytes", "2000000")
    yield server
    status, log = server.stop()
    assert status == 0
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def test_the_openai_client_gets_the_offline_vectors(server: Server, llm: LLM) -> None:
    texts = ["hello world", "a longer text about the sea " * 5, ""]
    expected = llm.embed_array(texts)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for form in ("float", "base64", openai.NOT_GIVEN):
            reply = client.embeddings.create(model=MODEL, input=texts, encoding_format=form)  # type: ignore[arg-type]
            got = [
                np.frombuffer(base64.b64decode(item.embedding), "<f4")
                if isinstance(item.embedding, str)
                else item.embedding
                for item in reply.data
            ]
            assert np.allclose(np.array(got), expected, atol=1e-6)
        assert [item.index for item in reply.data] == [0, 1, 2]
        assert reply.model == MODEL
        ids = llm.embed(texts[1])[0].prompt_token_ids
        assert reply.usage.prompt_tokens == reply.usage.total_tokens == 4 + len(ids) + 2
        by_ids = client.embeddings.create(model=MODEL, input=ids, encoding_format="float")
        assert np.allclose(by_ids.data[0].embedding, expected[1], atol=1e-6)
        batch = client.embeddings.create(model=MODEL, input=[ids, ids[:5]], encoding_format="float")
        assert len(batch.data) == 2
        assert client.models.list().data[0].id == MODEL


def test_the_async_openai_client_shares_batches_with_others(server: Server, llm: LLM) -> None:
    texts = [f"text number {n} " + "word " * (n % 23) for n in range(80)]
    expected = llm.embed_array(texts)

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(client.embeddings.create(model=MODEL, input=text) for text in texts))

    replies = asyncio.run(ask())
    assert np.allclose(np.array([reply.data[0].embedding for reply in replies]), expected, atol=1e-5)


def test_the_openai_client_raises_its_own_errors(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="another", input="x")
        with pytest.raises(openai.BadRequestError, match="matryoshka"):
            client.embeddings.create(model=MODEL, input="x", dimensions=32)


def test_the_body_of_an_embedding_reply(http: httpx.Client) -> None:
    body = http.post("/v1/embeddings", json={"input": "hello", "request_id": "abc", "user": "me", "surprise": 1}).json()
    (item,) = body.pop("data")
    created = body.pop("created")
    assert abs(created - time.time()) < 100
    assert body == {
        "id": "embd-abc",
        "object": "list",
        "model": MODEL,
        "usage": {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0, "prompt_tokens_details": None},
    }
    assert (item["index"], item["object"], len(item["embedding"])) == (0, "embedding", 384)
    headers = {"X-Request-Id": "from-header"}
    assert (
        http.post("/v1/embeddings", json={"input": "x", "request_id": "b"}, headers=headers).json()["id"]
        == "embd-from-header"
    )


def test_pooling_gives_rows_per_token_with_their_shape(http: httpx.Client, llm: LLM) -> None:
    (expected,) = llm.encode("hello world", pooling_task="token_embed")
    plain = http.post("/pooling", json={"input": "hello world", "task": "token_embed"}).json()
    assert plain["id"].startswith("pooling-")
    assert np.allclose(plain["data"][0]["data"], expected.outputs.array, atol=1e-6)
    packed = http.post(
        "/pooling", json={"input": ["hello world"], "task": "token_embed", "encoding_format": "base64"}
    ).json()
    (item,) = packed["data"]
    assert item["shape"] == [4, 384]
    matrix = np.frombuffer(base64.b64decode(item["data"]), "<f4").reshape(item["shape"])
    assert np.allclose(matrix, expected.outputs.array, atol=1e-6)
    default = http.post("/pooling", json={"input": "hello world"}).json()
    assert len(default["data"][0]["data"]) == 384


def test_a_cut_is_reported_in_body_header_and_metrics(http: httpx.Client) -> None:
    reply = http.post("/v1/embeddings", json={"input": ["short", "word " * 600], "truncate_prompt_tokens": -1})
    body = reply.json()
    assert "truncated" not in body["data"][0]
    assert (body["data"][1]["truncated"], body["data"][1]["original_tokens"]) == (True, 602)
    assert body["usage"]["truncated"] == 1
    assert reply.headers["x-poolhouse-truncated"] == "1"
    assert "poolhouse_truncated_prompts_total" in http.get("/metrics").text
    assert "x-poolhouse-truncated" not in http.post("/v1/embeddings", json={"input": "short"}).headers


def error(reply: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = reply.json()
    assert sorted(body) == ["code", "error", "message", "object", "param", "type"]
    assert body["object"] == "error"
    assert body["code"] == reply.status_code
    assert body["error"] == {name: body[name] for name in ("message", "type", "param", "code")}
    return body


def test_matryoshka_is_refused_in_the_words_of_vllm(http: httpx.Client) -> None:
    reply = http.post("/v1/embeddings", json={"input": "x", "dimensions": 32})
    problem = (
        b'"message":"Model \\"all-MiniLM-L6-v2\\" does not support matryoshka representation, '
        b'changing output dimensions will lead to poor results.","type":"BadRequestError","param":null,"code":400'
    )
    assert reply.content == b'{"object":"error",%s,"error":{%s}}' % (problem, problem)


@pytest.mark.parametrize(
    ("route", "body", "status", "kind", "param", "words"),
    [
        ("/v1/embeddings", {}, 400, "BadRequestError", "input", "Give input (texts or token ids) or messages"),
        ("/v1/embeddings", {"input": []}, 400, "BadRequestError", "input", "You must pass at least one prompt"),
        ("/v1/embeddings", {"input": None}, 400, "BadRequestError", "input", "Give input (texts or token ids) or messages"),
        ("/v1/embeddings", {"input": {"a": 1}}, 400, "BadRequestError", "input", "unknown key 'a'"),
        ("/v1/embeddings", {"input": ["a", 3]}, 400, "BadRequestError", "input[1]", "input[1] is int"),
        ("/v1/embeddings", {"input": [1.5]}, 400, "BadRequestError", "input[0]", "input[0] is float"),
        ("/v1/embeddings", {"input": [[5], [999999]]}, 400, "BadRequestError", "prompt_token_ids", "input[1]: Token id 999999 is out of vocabulary"),
        ("/v1/embeddings", {"input": "word " * 300}, 400, "BadRequestError", "input_tokens", "maximum context length is 256 tokens"),
        ("/v1/embeddings", {"input": "word " * 3000}, 400, "BadRequestError", "input_text", "contains 15000 characters (more than 4608"),
        ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 9999}, 400, "BadRequestError", "truncate_prompt_tokens", "greater than max_model_len"),
        ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": "nine"}, 400, "Bad Request", "body.truncate_prompt_tokens", "valid integer"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, 400, "Bad Request", "body.encoding_format", "'float', 'base64', 'bytes' or 'bytes_only'"),
        ("/v1/embeddings", {"input": "x", "normalize": "perhaps"}, 400, "Bad Request", "body.use_activation", "valid boolean"),
        ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 5.5}, 400, "Bad Request", "body.truncate_prompt_tokens", "valid integer"),
        ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": True}, 400, "Bad Request", "body.truncate_prompt_tokens", "valid number"),
        ("/v1/embeddings", {"input": "x", "mm_processor_kwargs": {"a": 1}}, 400, "BadRequestError", "mm_processor_kwargs", "not for requests"),
        ("/pooling", {"input": "x", "media_io_kwargs": {"a": {}}}, 400, "BadRequestError", "media_io_kwargs", "not for requests"),
        ("/v1/embeddings", {"input": "x", "prompt_name": "query"}, 400, "BadRequestError", "prompt_name", "no prompt named 'query'"),
        ("/v1/embeddings", {"input": "x", "model": "nope"}, 404, "NotFoundError", None, "The model `nope` does not exist."),
        ("/pooling", {"input": "x", "task": "classify"}, 400, "BadRequestError", "task", "Supported tasks: ['embed', 'token_embed']"),
        ("/pooling", {"input": "x", "task": "sing"}, 400, "BadRequestError", "task", "Unknown task: 'sing'. Tasks: ['embed', 'token_embed', 'classify', 'token_classify', 'extract', 'plugin', 'sparse']."),
    ],
)  # fmt: skip
def test_bad_requests_say_what_is_wrong(
    http: httpx.Client, route: str, body: dict[str, Any], status: int, kind: str, param: str | None, words: str
) -> None:
    reply = http.post(route, json=body)
    said = error(reply)
    assert (reply.status_code, said["type"], said["param"]) == (status, kind, param)
    assert words in said["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b'{"input":', {}, 400, "not valid JSON"),
        (b'{"input":"\xff\xfe"}', {}, 400, "not valid"),
        (b'{"input": NaN}', {}, 400, "not valid JSON"),
        (b'["x"]', {}, 400, "must be a JSON object"),
        (b"", {}, 400, "not valid JSON"),
        (b"x=1", {"content-type": "application/x-www-form-urlencoded"}, 400, "must be application/json"),
        (b'{"input":"' + b"x" * 3_000_000 + b'"}', {}, 413, "larger than 2000000 bytes"),
        (b"[" * 100_000, {}, 400, "nested deeper than 32 levels"),
        (b"[" * 20, {}, 400, "not valid JSON"),
    ],
)
def test_bodies_that_are_no_requests(
    http: httpx.Client, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    reply = http.post("/v1/embeddings", content=content, headers={"content-type": "application/json", **headers})
    assert reply.status_code == status
    assert words in error(reply)["message"]
    assert http.post("/v1/embeddings", json={"input": "and on it goes"}).status_code == 200


def test_unknown_paths_and_verbs(http: httpx.Client) -> None:
    reply = http.get("/xyzzy")
    assert (reply.status_code, error(reply)["type"]) == (404, "Not Found")
    assert error(reply)["message"] == "Not Found: there is no route /xyzzy."
    near = http.post("/v1/embedings", json={"input": "x"})
    assert error(near)["message"].endswith("no route /v1/embedings. Did you mean '/v1/embeddings'?")
    reply = http.get("/pooling")
    assert (reply.status_code, error(reply)["type"], reply.headers["allow"]) == (405, "Method Not Allowed", "POST")
    assert error(reply)["message"] == "Method Not Allowed: /pooling takes POST, not GET."
    assert len(error(http.get("/" + "x" * 5000))["message"]) < 150
    assert http.put("/ping").headers["allow"] == "GET, HEAD, POST"


def test_routes_about_the_server(http: httpx.Client) -> None:
    assert (http.get("/health").status_code, http.get("/health").content) == (200, b"")
    assert http.get("/version").json()["version"]
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"], model["tasks"]) == (MODEL, 256, ["embed", "token_embed"])
    assert 'poolhouse_requests_total{model="",route="/health",status="200"}' in http.get("/metrics").text
    schema = http.get("/openapi.json").json()
    body = schema["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "input" in schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]


def test_mixed_load_from_many_connections_gets_offline_answers(server: Server, llm: LLM) -> None:
    texts = [" ".join(["word", str(n)] * (n % 40 + 1)) for n in range(64)]
    expected = llm.embed_array(texts)

    def ask(index: int) -> float:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            if index % 8 == 0:
                assert client.post("/v1/embeddings", json={"input": [5, 10**9]}).status_code == 400
            several = [texts[index], texts[(index + 7) % 64]] if index % 2 else texts[index]
            reply = client.post("/v1/embeddings", json={"input": several}).json()
        return float(np.abs(np.array(reply["data"][0]["embedding"]) - expected[index]).max())

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(ask, range(64))) < 1e-5


def test_a_client_that_hangs_up_disturbs_nobody(server: Server, http: httpx.Client) -> None:
    body = json.dumps({"input": [f"text {n} " * 60 for n in range(200)]}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
    assert http.post("/v1/embeddings", json={"input": "still here?"}).status_code == 200
    for _ in range(200):
        metrics = http.get("/metrics").text
        if 'status="499"' in metrics and "poolhouse_requests_in_flight 1.0" in metrics:
            break
        time.sleep(0.05)
    else:
        pytest.fail("The abandoned request was not noticed.")


def test_sigterm_answers_what_is_in_flight() -> None:
    server = Server(
        "--error-format",
        "nested",
        "--matryoshka-dimensions",
        "64,128",
        "--gpu-memory-utilization",
        "0.5",
        "--shutdown-seconds",
        "120",
    )
    with httpx.Client(base_url=server.url, timeout=60) as client:
        reply = client.post("/v1/embeddings", json={"input": "x", "dimensions": 65})
        assert reply.json()["error"]["message"].startswith(
            f'Model "{MODEL}" only supports [64, 128] matryoshka dimensions'
        )
        assert (
            len(client.post("/v1/embeddings", json={"input": "x", "dimensions": 64}).json()["data"][0]["embedding"])
            == 64
        )
    statuses: list[int] = []

    def ask() -> None:
        reply = httpx.post(f"{server.url}/v1/embeddings", json={"input": ["word " * 200] * 60}, timeout=180)
        statuses.append(reply.status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    with httpx.Client(base_url=server.url) as client:
        while "poolhouse_requests_in_flight 4.0" not in client.get("/metrics").text:
            time.sleep(0.01)
    status, log = server.stop()
    for thread in threads:
        thread.join(180)
    assert statuses == [200, 200, 200]
    assert status == 0
    assert "poolhouse: These options mean nothing to Poolhouse and are ignored: gpu_memory_utilization." in log
    assert "Traceback" not in log


def test_what_a_stop_cannot_wait_for_is_refused_in_the_words_of_the_contract() -> None:
    server = Server("--shutdown-seconds", "0.2")
    replies: list[httpx.Response] = []

    def ask() -> None:
        replies.append(httpx.post(f"{server.url}/v1/embeddings", json={"input": ["word " * 200] * 2000}, timeout=120))

    asking = threading.Thread(target=ask)
    asking.start()
    with httpx.Client(base_url=server.url) as client:
        while "poolhouse_requests_in_flight 2.0" not in client.get("/metrics").text:
            time.sleep(0.01)
    status, log = server.stop()
    asking.join(60)
    assert replies[0].status_code == 503
    assert error(replies[0])["type"] == "ServiceUnavailableError"
    assert status == 0
    assert "Traceback" not in log


def test_a_text_of_fifty_megabytes_is_refused_or_cut_or_split_and_the_server_goes_on() -> None:
    server = Server(
        "--overflow", "chunk", "--hf-overrides", '{"is_matryoshka": true}', "--pooler-config.max-embed-len", "999"
    )
    huge = "word " * 10_000_000
    with httpx.Client(base_url=server.url, timeout=60) as client:
        refused = client.post("/v1/embeddings", json={"input": huge})
        assert (refused.status_code, refused.json()["param"]) == (400, "input_text")
        cut = client.post("/v1/embeddings", json={"input": huge, "truncate_prompt_tokens": -1}).json()
        assert cut["usage"]["prompt_tokens"] == 256
        assert (cut["data"][0]["truncated"], cut["data"][0]["original_is_estimate"]) == (True, True)
        too_large = client.post("/v1/embeddings", json={"input": [huge, huge]})
        assert (too_large.status_code, too_large.json()["code"]) == (413, 413)
        split = client.post("/v1/embeddings", json={"input": "word " * 600, "dimensions": 8}).json()
        assert (split["data"][0]["chunks"], split["usage"]["prompt_tokens"]) == (3, 602)
        assert len(split["data"][0]["embedding"]) == 8
        assert client.get("/health").status_code == 200
    status, log = server.stop()
    assert status == 0
    assert "Traceback" not in log


def test_a_model_that_is_not_there_is_one_clear_line() -> None:
    for arguments, words, status in (
        (["/no/such/folder"], "/no/such/folder", 1),
        (["--max-model-length", "3"], "Did you mean --max-model-len?", 2),
        (["--port", "eighty"], "port: ", 2),
        (["--pooler-config.pooling-type", "MEEN"], "Did you mean 'MEAN'", 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "poolhouse.cli", "serve", *arguments],
            capture_output=True, text=True, timeout=60, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_int8_is_served_as_offline() -> None:
    running = Server("--quantization", "int8")
    texts = ["The moon pulls the sea.", "Bread needs time.", "Bread " * 40]
    try:
        answer = httpx.post(f"{running.url}/v1/embeddings", json={"model": MODEL, "input": texts}, timeout=60).json()
    finally:
        running.stop()
    got = np.array([item["embedding"] for item in answer["data"]], np.float32)
    with LLM(quantization="int8") as int8, LLM() as plain:
        # Batches may be others; see tests/models/test_int8.py.
        np.testing.assert_allclose(got, int8.embed_array(texts), atol=1e-3)
        cosines = (got * plain.embed_array(texts)).sum(1)
    assert 0.99 < cosines.min() < 0.99999
