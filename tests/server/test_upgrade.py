"""Offers to speak another protocol: ignored (RFC 9110, 7.8), and the body is the request's own, however it comes."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator

import pytest

from tests.server.running import Running, running
from tests.server.sockets import Client, Reply

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
WEBSOCKET = (
    b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
OFFERS = {
    "none": b"",
    "h2c": H2C,
    "tls": b"Upgrade: TLS/1.3, HTTP/2.0\r\nConnection: Upgrade\r\n",
    "websocket": WEBSOCKET,
    "two": b"upgrade:h2c\r\nConnection: close-not\r\nUPGRADE: foo/2\r\nconnection: uPGRADE\r\n",
    "half": b"Connection: Upgrade\r\n",
    "other half": b"Upgrade: h2c\r\n",
}
# What would be answered by itself, if a body were read as the next request.
SMUGGLED = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module", params=[False, True], ids=["httptools", "h11"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    # Nobody reads its log, which would fill the pipe.
    with running(h11=request.param, header_timeout_seconds=60, log_level="critical") as started:
        yield started


def post(text: str, offer: bytes, chunked: bool = False, path: str = "/v1/embeddings") -> bytes:
    return raw(json.dumps({"input": text}).encode(), offer, chunked, path)


def raw(body: bytes, offer: bytes, chunked: bool = False, path: str = "/v1/embeddings") -> bytes:
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % path.encode() + offer + length
    if chunked:
        half = len(body) // 2
        body = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (half, body[:half], len(body) - half, body[half:])
    return head + b"\r\n\r\n" + body


def all_of(server: Running, *parts: bytes) -> bytes:
    """What comes back until the server closes the connection, which it is asked to with the last request."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.01)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def vector(reply: Reply) -> list[float]:
    assert reply.status == 200, reply.body
    embedding: list[float] = reply.json["data"][0]["embedding"]
    return embedding


@pytest.fixture(scope="module")
def expected(server: Running) -> dict[str, list[float]]:
    client = Client(server.url)
    return {text: vector(client.ask("/v1/embeddings", {"input": text})) for text in ("one", "two")}


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize("offer", list(OFFERS))
def test_an_offer_is_ignored_and_the_connection_goes_on(
    server: Running, expected: dict[str, list[float]], offer: str, chunked: bool
) -> None:
    client = Client(server.url)
    for text in ("one", "two"):
        client.socket.sendall(post(text, OFFERS[offer], chunked))
        assert vector(client.reply()) == expected[text]
    client.socket.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n" + OFFERS[offer] + b"\r\n")
    reply = client.reply()
    assert (reply.status, "upgrade" in reply.headers) == (200, False)
    assert vector(client.ask("/v1/embeddings", {"input": "one"})) == expected["one"]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_a_request_with_an_offer_may_be_cut_anywhere(
    server: Running, expected: dict[str, list[float]], chunked: bool
) -> None:
    request = post("one", H2C, chunked)
    client = Client(server.url)
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for cut in range(1, len(request)):
        client.socket.sendall(request[:cut])
        time.sleep(0.001)
        client.socket.sendall(request[cut:])
        assert vector(client.reply()) == expected["one"], cut
    # And byte by byte, with the next request behind it.
    for byte in request + post("two", b""):
        client.socket.sendall(bytes([byte]))
    assert vector(client.reply()) == expected["one"]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize("offer", ["h2c", "websocket", "two"])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/nothing", "/v1/models"])
def test_a_body_is_never_the_next_request(server: Running, offer: str, chunked: bool, path: str) -> None:
    request = raw(SMUGGLED, OFFERS[offer], chunked, path)
    last = b"GET /health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head, body = request.split(b"\r\n\r\n", 1)
    for parts in ((request + last,), (head + b"\r\n\r\n", body, last), (head, b"\r\n\r\n" + body + last)):
        got = all_of(server, *parts)
        statuses = re.findall(rb"HTTP/1.1 (\d)", got)
        assert statuses == [b"4", b"2"], got
        assert b'"version"' not in got
        assert got.endswith(b'{"status":"ready"}')


def test_requests_with_offers_may_come_all_at_once(server: Running, expected: dict[str, list[float]]) -> None:
    last = post("one", b"Connection: close\r\n")
    requests = [post("one", H2C), post("two", WEBSOCKET, chunked=True), post("one", b""), post("two", H2C), last]
    got = all_of(server, b"".join(requests))
    bodies = [part.split(b"HTTP/1.1 ")[0] for part in got.split(b"\r\n\r\n")[1:]]
    vectors = [json.loads(body)["data"][0]["embedding"] for body in bodies]
    assert vectors == [expected[text] for text in ("one", "two", "one", "two", "one")]


def test_an_old_client_and_one_that_asks_before_it_sends_may_offer_too(
    server: Running, expected: dict[str, list[float]]
) -> None:
    old = post("one", b"Connection: Upgrade\r\nUpgrade: h2c\r\n").replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    got = all_of(server, old)
    assert json.loads(got.split(b"\r\n\r\n", 1)[1])["data"][0]["embedding"] == expected["one"]
    client = Client(server.url)
    head, body = post("two", H2C + b"Expect: 100-continue\r\n").split(b"\r\n\r\n", 1)
    client.socket.sendall(head + b"\r\n\r\n")
    # http.client skips the interim reply.
    time.sleep(0.01)
    client.socket.sendall(body)
    assert vector(client.reply()) == expected["two"]


@pytest.mark.parametrize("head", [
    b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
    b"CONNECT /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
])  # fmt: skip
def test_no_tunnel_is_opened_and_what_was_meant_for_it_is_not_read(server: Running, head: bytes) -> None:
    for parts in ((head + SMUGGLED,), (head, SMUGGLED)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            try:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.01)
                got = b"".join(iter(lambda: connection.recv(65536), b""))
            except ConnectionError:
                # Closed with bytes unread, which may tear down the reply.
                continue
        assert got.startswith((b"HTTP/1.1 501", b"HTTP/1.1 400")), got
        assert (got.count(b"HTTP/1.1 "), b'"version"' in got) == (1, False)
