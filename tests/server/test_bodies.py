"""Bodies in every coding, charset and spelling that clients send: read, or refused in words that say why."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import brotli
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.server.wire.body import _with_whole_surrogates
from poolhouse.settings import ServerSettings
from tests.server.documented import Document, checked
from tests.server.engines import every_kind

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LIMIT = 1_000_000


def raw_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


def quick_brotli(content: bytes) -> bytes:
    packed: bytes = brotli.compress(content, quality=1)
    return packed


def zstd_of_unknown_size(content: bytes) -> bytes:
    packer = zstd.ZstdCompressor()
    return packer.compress(content[:9]) + packer.compress(content[9:]) + packer.flush()


def in_members(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: pack(content[:9]) + pack(content[9:])


PACKED: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("GZip", in_members(gzip.compress)),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("br", brotli.compress),
    ("zstd", zstd.compress),
    ("zstd", in_members(zstd_of_unknown_size)),
]
# One way to pack for each coding, to break it.
CODINGS = {"gzip": gzip.compress, "deflate": zlib.compress, "br": quick_brotli, "zstd": zstd.compress}


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with TestClient(create_app(every_kind(), ServerSettings(max_body_bytes=LIMIT))) as client:
        client.headers["content-type"] = "application/json"
        yield client


@pytest.fixture(scope="module")
def document(http: TestClient) -> Document:
    return checked(http)


def vectors(http: TestClient, content: bytes, **headers: str) -> Any:
    reply = http.post(
        "/embed", content=content, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )
    assert reply.status_code == 200, reply.text
    return reply.json()


BODY = json.dumps({"inputs": ["ein Lied übers Meer", "two words", "字"]}, ensure_ascii=False).encode()


@pytest.mark.parametrize(("coding", "pack"), PACKED)
def test_a_packed_body_is_read_as_the_plain_one(http: TestClient, coding: str, pack: Callable[[bytes], bytes]) -> None:
    assert vectors(http, pack(BODY), content_encoding=coding) == vectors(http, BODY)


def test_codings_are_undone_in_turn_and_no_coding_is_none(http: TestClient) -> None:
    plain = vectors(http, BODY)
    assert vectors(http, gzip.compress(gzip.compress(BODY)), content_encoding="gzip, gzip") == plain
    assert vectors(http, brotli.compress(zstd.compress(BODY)), content_encoding="zstd , br,") == plain
    assert vectors(http, BODY, content_encoding="identity") == vectors(http, BODY, content_encoding="UTF-8") == plain
    several = [("content-encoding", "gzip"), ("content-encoding", "br")]
    packed = brotli.compress(gzip.compress(BODY))
    assert http.post("/embed", content=packed, headers=several).json() == plain


@pytest.mark.parametrize(
    "coding", ["compress", "snappy", "gzip, lz4", "aws-chunked", "gzip;q=1", ", ".join(["gzip"] * 5)]
)
def test_another_coding_is_a_415_that_names_those_taken(http: TestClient, document: Document, coding: str) -> None:
    for path in document.posts:
        reply = http.post(path, content=BODY, headers={"content-encoding": coding})
        assert (reply.status_code, reply.headers["accept-encoding"]) == (415, "gzip, deflate, br, zstd")
        assert "gzip, deflate, br, zstd" in reply.text


@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_cut_corrupt_or_goes_on_is_a_400(http: TestClient, document: Document, coding: str) -> None:
    packed = CODINGS[coding](BODY)
    broken = [packed[:cut] for cut in (0, 1, 5, len(packed) // 2, len(packed) - 1)]
    broken += [packed + b"more", BODY, bytes([packed[0]]) + bytes(50), bytes(reversed(packed))]
    for content in broken:
        reply = http.post("/v1/embeddings", content=content, headers={"content-encoding": coding})
        assert reply.status_code == 400, (content, reply.text)
        assert f"not valid {coding}" in reply.json()["message"]
    assert vectors(http, packed, content_encoding=coding)


def test_endless_members_are_refused(http: TestClient) -> None:
    for coding in ("gzip", "zstd"):
        content = CODINGS[coding](b"") * 20_000
        reply = http.post("/v1/embeddings", content=content, headers={"content-encoding": coding})
        assert (reply.status_code, "streams end to end" in reply.text) == (400, True)


@pytest.mark.parametrize("coding", CODINGS)
def test_the_limit_counts_what_is_unpacked_and_memory_stays_bounded(http: TestClient, coding: str) -> None:
    pack = CODINGS[coding]
    fits = b'{"inputs":"' + b"a" * (LIMIT - 13) + b'"}'
    for content, status in ((fits, 200), (fits + b" ", 413)):
        reply = http.post("/embed", content=pack(content), headers={"content-encoding": coding})
        assert reply.status_code == status
    assert str(LIMIT) in reply.text
    bomb = pack(bytes(50 * LIMIT))
    tracemalloc.start()
    for content, codings in ((bomb, coding), (pack(bomb), f"{coding}, {coding}")):
        assert http.post("/embed", content=content, headers={"content-encoding": codings}).status_code == 413
    assert tracemalloc.get_traced_memory()[1] < 5 * LIMIT
    tracemalloc.stop()


def test_a_zstd_window_that_the_sender_chose_too_large_is_refused(http: TestClient) -> None:
    options = {zstd.CompressionParameter.window_log: 27}
    packer = zstd.ZstdCompressor(options=options)
    content = packer.compress(BODY) + packer.flush()
    reply = http.post("/v1/embeddings", content=content, headers={"content-encoding": "zstd"})
    assert (reply.status_code, "memory" in reply.text) == (400, True)


@pytest.mark.parametrize(
    "charset", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_every_unicode_encoding_is_read_told_or_not(http: TestClient, charset: str) -> None:
    content = BODY.decode().encode(charset)
    plain = vectors(http, BODY)
    assert vectors(http, content) == plain
    assert vectors(http, content, content_type=f"application/json; charset={charset}") == plain


def test_another_charset_is_a_415_where_it_makes_a_difference(http: TestClient, document: Document) -> None:
    for path in document.posts:
        content = json.dumps({"input": "Lied übers Meer"}, ensure_ascii=False).encode("latin-1")
        reply = http.post(path, content=content, headers={"content-type": 'application/json; charset="ISO-8859-1"'})
        assert (reply.status_code, "ISO-8859-1" in reply.text) == (415, True)
    # ASCII is the same in both, and some name a charset that they do not write.
    assert vectors(http, b'{"inputs":"a"}', content_type="application/json;charset=ISO-8859-1")
    assert vectors(http, BODY, content_type="application/json;charset=ISO-8859-1") == vectors(http, BODY)


def test_wrong_utf_16_is_a_400(http: TestClient) -> None:
    for content in ('{"input":"a"}'.encode("utf-16")[:-1], b'\xff\xfe{\0"\0\0\xd8', b"\xff\xfe"):
        reply = http.post("/v1/embeddings", content=content)
        assert (reply.status_code, reply.json()["type"]) == (400, "Bad Request")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (r"cut \ud83d here", "cut \ufffd here"),
        (r"cut \uDE00 here", "cut \ufffd here"),
        (r"\ud83d\ude00", "😀"),
        (r"\ud83d\ud83d\ude00\ude00", "\ufffd😀\ufffd"),
        (r"\ude00\ud83d", "\ufffd\ufffd"),
        (r"\\ud83d \\\ud83d", "\\ud83d \\\ufffd"),
        (r"\ud83d\\ude00", "\ufffd\\ude00"),
    ],
)
def test_half_a_surrogate_is_read_as_javascript_would_send_it(http: TestClient, text: str, read: str) -> None:
    body = f'{{"query":"{text}","{text}":1,"documents":["fine","{text}"]}}'.encode()
    reply = http.post("/rerank", content=body)
    assert reply.status_code == 200
    assert sorted(result["document"]["text"] for result in reply.json()["results"]) == sorted(["fine", read])


@given(st.lists(st.sampled_from(["\\\\", '\\"', "\\ud83d", "\\ude00", "\\uDBFF", "\\u0041", "a", "ud83d", "\\n"])))
def test_halves_are_found_wherever_python_finds_them(parts: list[str]) -> None:
    raw = ('"' + "".join(parts) + '"').encode()
    expected = json.loads(raw).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert json.loads(_with_whole_surrogates(raw)) == expected


@pytest.mark.parametrize(
    ("content", "words", "parameter"),
    [
        (b'{"input":"x","priority":NaN}', "NaN is no number of JSON", "body.24"),
        (b'{"input":"x","weights":[1,-Infinity]}', "-Infinity is no number of JSON", "body.27"),
        (b'{"input":"x","weights":[Infinity]}', "near '", "body.24"),
        (b'{"input":"x","model":"a","input":"y"}', "names 'input' twice", "body.input"),
        (b'{"input":[{"prompt":"a"},{"prompt":"b","prompt" :"c"}]}', "names 'prompt' twice", "body.prompt"),
        (b'{"input":"x","input":null}', "names 'input' twice", "body.input"),
        (b'{"input":"x","user":{"\\u0061":1,"a":2},"n":' + b"1" * 300 + b"}", "names 'a' twice", "body.a"),
    ],
)
def test_what_readers_of_json_read_differently_is_refused(
    http: TestClient, content: bytes, words: str, parameter: str
) -> None:
    reply = http.post("/v1/embeddings", content=content)
    assert (reply.status_code, reply.json()["param"]) == (400, parameter)
    assert words in reply.json()["message"]


def test_colons_in_texts_are_no_names(http: TestClient) -> None:
    for text in ('a": 1, "b": 2', "\\", ':"', '{":"}', '\\":', '" :'):
        assert vectors(http, json.dumps({"inputs": [text, '"a": "b"']}).encode())


def test_a_packed_body_leaves_the_event_loop_to_others() -> None:
    app = create_app(every_kind())
    packed = gzip.compress(b'{"inputs":[' + b'"a",' * 1_000_000 + b'"a"]}')
    turns: list[None] = []

    async def ask() -> int:
        statuses: list[int] = []
        messages = [{"type": "http.request", "body": packed, "more_body": False}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Future()

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        async def watch() -> None:
            while not statuses:
                await asyncio.sleep(0.001)
                turns.append(None)

        headers = [(b"content-type", b"application/json"), (b"content-encoding", b"gzip")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/embed",
            "headers": headers,
            "query_string": b"",
            "state": {},
        }
        watching = asyncio.ensure_future(watch())
        await app(scope, receive, send)
        await watching
        return statuses[0]

    assert asyncio.run(ask()) == 422
    assert turns  # nothing else in this request waits
