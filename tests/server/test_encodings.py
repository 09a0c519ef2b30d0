"""Encodings of vectors over HTTP: every form, precision and byte order, and headers that grow too long."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.server.wire.encoding import Encoding, encode, value, vector
from poolhouse.testing import FakeEngine
from poolhouse.vectors.precision import PRECISIONS, Calibration, Precision, dequantize, quantize

WIDTH = 16
NUMPY = {
    "float32": "f4", "float16": "f2", "bfloat16": "u2", "fp8_e4m3": "u1", "fp8_e5m2": "u1",
    "int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1",
}  # fmt: skip
ORDER = {"native": "=", "little": "<", "big": ">"}
TEXTS = ["one", "two words", "and three words"]
KEYS = {"/v1/embeddings": "embedding", "/pooling": "data"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    engines = [
        FakeEngine("fake", width=WIDTH),
        FakeEngine("odd", width=12),
        FakeEngine("judge", tasks=("classify",), label_names={0: "no", 1: "yes"}),
    ]
    with TestClient(create_app(engines)) as client:
        yield client


def post(client: TestClient | httpx.Client, path: str = "/v1/embeddings", **body: Any) -> httpx.Response:
    reply = client.post(path, json={"input": TEXTS} | body)
    assert reply.status_code == 200, reply.text
    return reply


def vectors(client: TestClient, path: str = "/v1/embeddings", **body: Any) -> list[np.ndarray]:
    """What the answers are, from a plain reply."""
    return [np.array(item[KEYS[path]], np.float32) for item in post(client, path, **body).json()["data"]]


def read(data: bytes, precision: str, endianness: str) -> np.ndarray:
    return np.frombuffer(data, np.dtype(NUMPY[precision]).newbyteorder(ORDER[endianness]))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
@pytest.mark.parametrize("endianness", ["native", "little", "big"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_base64_and_bytes_hold_the_values_asked_for(
    client: TestClient, path: str, precision: Precision, endianness: str
) -> None:
    asked = {"embed_dtype": precision, "endianness": endianness}
    expected = [quantize(plain, precision) for plain in vectors(client, path)]

    body = post(client, path, encoding_format="base64", **asked).json()
    for item, codes in zip(body["data"], expected, strict=True):
        assert np.array_equal(read(base64.b64decode(item[KEYS[path]]), precision, endianness), codes)

    reply = post(client, path, encoding_format="bytes", **asked)
    assert reply.headers["content-type"] == "application/octet-stream"
    metadata = json.loads(reply.headers["metadata"])
    assert list(metadata) == ["id", "created", "model", "data", "usage"]
    assert metadata["model"] == "fake"
    assert metadata["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert metadata["id"].startswith({"/v1/embeddings": "embd-", "/pooling": "pooling-"}[path])
    size = expected[0].nbytes
    assert metadata["data"] == [
        {
            "index": index,
            "embed_dtype": precision,
            "endianness": endianness,
            "start": index * size,
            "end": (index + 1) * size,
            "shape": list(codes.shape),
        }
        for index, codes in enumerate(expected)
    ]
    for item, codes in zip(metadata["data"], expected, strict=True):
        got = read(reply.content[item["start"] : item["end"]], precision, endianness)
        assert np.array_equal(got.reshape(item["shape"]), codes)

    alone = post(client, path, encoding_format="bytes_only", **asked)
    assert alone.headers["content-type"] == "application/octet-stream"
    assert "metadata" not in alone.headers
    assert alone.content == reply.content


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_whole_numbers_stand_in_json_too(client: TestClient, precision: Precision) -> None:
    items = post(client, embed_dtype=precision, endianness="big").json()["data"]
    for item, plain in zip(items, vectors(client), strict=True):
        assert item["embedding"] == quantize(plain, precision).tolist()


def test_other_precisions_leave_numbers_in_json_as_they_are(client: TestClient) -> None:
    for precision in ("float16", "bfloat16", "fp8_e4m3"):
        items = post(client, embed_dtype=precision).json()["data"]
        assert np.array_equal(np.array([item["embedding"] for item in items], np.float32), vectors(client))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_matrices_of_tokens_keep_their_shapes(client: TestClient, precision: Precision) -> None:
    asked = {"task": "token_embed", "embed_dtype": precision}
    expected = [quantize(matrix, precision) for matrix in vectors(client, "/pooling", task="token_embed")]
    assert [len(codes) for codes in expected] == [1, 2, 3]
    reply = post(client, "/pooling", encoding_format="bytes", **asked)
    for item, codes in zip(json.loads(reply.headers["metadata"])["data"], expected, strict=True):
        got = read(reply.content[item["start"] : item["end"]], precision, "native").reshape(item["shape"])
        assert np.array_equal(got, codes)
    for item, codes in zip(
        post(client, "/pooling", encoding_format="base64", **asked).json()["data"], expected, strict=True
    ):
        got = read(base64.b64decode(item["data"]), precision, "native").reshape(item["shape"])
        assert np.array_equal(got, codes)


def test_flat_answers_of_different_lengths_are_cast_number_by_number() -> None:
    arrays = [np.linspace(-1, 1, length, dtype=np.float32) for length in (3, 1, 5)]
    for precision in ("float16", "bfloat16", "fp8_e5m2"):
        encoded = encode(arrays, Encoding("base64", precision))
        assert [array.shape for array in encoded] == [(3,), (1,), (5,)]
        for array, source in zip(encoded, arrays, strict=True):
            assert np.array_equal(array, quantize(source, precision))


def test_an_answer_without_rows_has_no_bytes() -> None:
    empty = np.zeros((0, WIDTH), np.float32)
    full = np.full((2, WIDTH), 0.25, np.float32)
    for precision in PRECISIONS:
        encoded = encode([full, empty], Encoding("base64", precision))
        assert len(encoded[1]) == 0
        assert value(encoded[1], "base64") == ""
        assert np.array_equal(encoded[0], quantize(full, precision))


def test_base64_of_other_dialects_is_little_endian_float32() -> None:
    numbers = np.linspace(-1, 1, 8, dtype=np.float32)
    assert base64.b64decode(vector(numbers, "base64")) == numbers.astype("<f4").tobytes()
    assert vector(numbers[::2], "float").flags.c_contiguous


def test_stored_ranges_are_used_for_the_vectors_they_were_made_of() -> None:
    calibration = Calibration(np.full(WIDTH, -0.3, np.float32), np.full(WIDTH, 0.5, np.float32))
    engine = FakeEngine("fake", width=WIDTH, calibration=calibration, dimensions=(8,))
    with TestClient(create_app([engine])) as client:
        (plain,) = vectors(client, input="one")
        (item,) = post(client, input="one", embed_dtype="int8").json()["data"]
        assert item["embedding"] == quantize(plain, "int8", calibration).tolist()
        (short,) = vectors(client, input="one", dimensions=8)
        (item,) = post(client, input="one", embed_dtype="int8", dimensions=8).json()["data"]
        assert item["embedding"] == quantize(short, "int8", calibration).tolist()
        (tokens,) = vectors(client, "/pooling", input="one", task="token_embed")
        (item,) = post(client, "/pooling", input="one", embed_dtype="int8", task="token_embed").json()["data"]
        assert item["data"] == quantize(tokens, "int8").tolist()
    multi_vector = FakeEngine("colbert", width=WIDTH, tasks=("token_embed",), calibration=calibration)
    with TestClient(create_app([multi_vector])) as client:
        (item,) = post(client, "/pooling", input="one", embed_dtype="int8").json()["data"]
        assert item["data"] == quantize(tokens, "int8", calibration).tolist()


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/embeddings", {"embed_dtype": "int4"}, "body.embed_dtype", "Input should be 'float32', 'float16'"),
        ("/v1/embeddings", {"endianness": "middle"}, "body.endianness", "'native', 'little' or 'big'"),
        ("/v1/embeddings", {"embed_dtype": "binary", "model": "odd"}, "embed_dtype", "multiple of 8, got 12"),
        ("/pooling", {"embed_dtype": "ubinary", "model": "judge"}, "embed_dtype", "for vectors (tasks embed and token_embed), not for classify"),
        ("/pooling", {"embed_dtype": "int8", "model": "judge", "encoding_format": "bytes"}, "embed_dtype", "not for classify"),
    ],
)  # fmt: skip
def test_what_a_precision_cannot_take_is_refused(
    client: TestClient, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    reply = client.post(path, json={"input": TEXTS} | body)
    said = reply.json()
    assert (reply.status_code, said["param"]) == (400, param)
    assert words in said["message"]


def test_a_cut_is_reported_beside_bytes(client: TestClient) -> None:
    reply = post(client, encoding_format="bytes", truncate_prompt_tokens=2)
    assert reply.headers["x-poolhouse-truncated"] == "1"
    assert json.loads(reply.headers["metadata"])["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


@pytest.fixture(scope="module", params=["h11", "httptools"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A real server, with a model whose name no header can hold as it is."""
    app = create_app([FakeEngine("模型\r\nx: y", width=WIDTH)])
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=request.param, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def ask_with_http_client(url: str, body: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """By Python's own client, which takes the shortest headers of those that vLLM's users have."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    connection.request("POST", address.path, json.dumps(body), {"Content-Type": "application/json"})
    with connection.getresponse() as reply:
        found = json.loads(reply.headers["metadata"]), reply.read()
    connection.close()
    return found


@pytest.mark.parametrize("count", [1, 600, 3000])
def test_a_header_of_many_items_breaks_no_client(url: str, count: int) -> None:
    body = {"input": [f"text {number}" for number in range(count)], "encoding_format": "bytes", "endianness": "little"}
    with httpx.Client(timeout=60) as client:
        reply = post(client, f"{url}/v1/embeddings", **body)
    metadata, content = ask_with_http_client(f"{url}/v1/embeddings", body)
    seen = json.loads(reply.headers["metadata"])
    for name in ("data", "shape", "count", "model", "usage"):
        assert seen.get(name) == metadata.get(name)
    assert reply.content == content
    assert metadata["model"] == "模型\r\nx: y"
    matrix = np.frombuffer(content, "<f4").reshape(count, WIDTH)
    assert np.allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-6)
    if count <= 600:
        assert len(metadata["data"]) == count
        assert "count" not in metadata
    else:
        del metadata["id"], metadata["created"], metadata["model"]
        assert metadata == {
            "count": count,
            "embed_dtype": "float32",
            "endianness": "little",
            "shape": [WIDTH],
            "usage": {"prompt_tokens": 2 * count, "total_tokens": 2 * count},
        }


def test_a_header_of_many_matrices_gives_their_rows(client: TestClient) -> None:
    texts = ["word " * (1 + number % 3) for number in range(1000)]
    asked = {"task": "token_embed", "encoding_format": "bytes", "embed_dtype": "float16"}
    reply = post(client, "/pooling", input=texts, **asked)
    metadata = json.loads(reply.headers["metadata"])
    assert (metadata["count"], metadata["shape"]) == (1000, [None, WIDTH])
    assert metadata["rows"] == [1 + number % 3 for number in range(1000)]
    matrix = np.frombuffer(reply.content, "f2").reshape(-1, WIDTH)
    assert len(matrix) == sum(metadata["rows"])
    assert np.array_equal(matrix[:1], dequantize(np.array(vectors(client, "/pooling", input=["word"], task="token_embed")[0], "f2"), "float16"))  # fmt: skip


def test_more_lengths_than_a_header_holds_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poolhouse.server.wire.encoding._MAX_HEADER_BYTES", 200)
    body = {"input": TEXTS * 20, "task": "token_embed", "encoding_format": "bytes"}
    reply = client.post("/pooling", json=body)
    assert (reply.status_code, reply.json()["param"]) == (400, "encoding_format")
    assert "A header cannot describe 60 arrays of different lengths" in reply.json()["message"]
    assert client.post("/pooling", json=body | {"encoding_format": "bytes_only"}).status_code == 200


def test_native_order_is_that_of_the_server() -> None:
    (array,) = encode([np.ones(2, np.float32)], Encoding("bytes", "float32", "native"))
    assert array.tobytes() == np.ones(2, "<f4" if sys.byteorder == "little" else ">f4").tobytes()
