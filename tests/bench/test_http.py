"""The client's side of HTTP/1.1, against a server that says every byte."""

from __future__ import annotations

import asyncio

import pytest

from poolhouse.bench.http import BadReply, Connection, Reply, Target
from poolhouse.errors import ConfigError
from tests.bench.servers import ScriptedServer, reply


def ask(server: ScriptedServer, *contents: bytes) -> list[Reply]:
    """Replies to these bodies, one after the other on one connection."""
    target = Target.of(server.url + "/path", {})

    async def exchange() -> list[Reply]:
        connection = Connection(target)
        try:
            return [await connection.ask(target.request(content)) for content in contents]
        finally:
            connection.close()

    return asyncio.run(asyncio.wait_for(exchange(), 20))


@pytest.mark.parametrize(
    ("sent", "then", "status", "body"),
    [
        (reply(b"hello"), "keep", 200, b"hello"),
        (reply(b""), "keep", 200, b""),
        (reply(b"busy", 503), "keep", 503, b"busy"),
        (b"HTTP/1.1 200\r\nCONTENT-LENGTH:   2  \r\n\r\nok", "keep", 200, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "keep", 204, b""),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", "close", 200, b"until the end"),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", "close", 200, b"ok"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n3;why=1\r\nabc\r\nA\r\n0123456789\r\n0\r\nx: y\r\n\r\n",
            "keep", 200, b"abc0123456789",
        ),
    ],
)  # fmt: skip
def test_a_reply_is_read_whole_and_its_bytes_are_counted(sent: bytes, then: str, status: int, body: bytes) -> None:
    with ScriptedServer([(sent, then)]) as server:
        # The second reply shows that nothing of the first is left.
        assert ask(server, b"{}", b"{}") == [Reply(status, body, len(sent))] * 2


@pytest.mark.parametrize(
    ("sent", "then", "connections"),
    [
        (reply(b"x"), "keep", 1),
        (reply(b"x", fields="Connection: close\r\n"), "close", 3),
        # Closed without a word: the next request finds out, and is sent again.
        (reply(b"x"), "close", 3),
    ],
)
def test_connections_are_kept_where_the_server_keeps_them(sent: bytes, then: str, connections: int) -> None:
    with ScriptedServer([(sent, then)]) as server:
        assert [answer.body for answer in ask(server, b"1", b"2", b"3")] == [b"x"] * 3
        assert server.connections == connections
        assert [request[-1:] for request in server.requests] == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"", "without a reply"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "ends in its head"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", "in the middle of a reply"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nshort", "in the middle of a reply"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "chunk of the reply begins with b'zz"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n", "content-length is b'many'"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP/1.1; it begins with b'SSH-2.0-OpenSSH'"),
        (b"HTTP/1.1 200 OK\r\nlong: " + b"x" * (1 << 20) + b"\r\n\r\n", "head is longer than"),
    ],
)
def test_what_is_no_reply_is_said(sent: bytes, words: str) -> None:
    with ScriptedServer([(sent, "close")]) as server, pytest.raises(BadReply, match=words):
        ask(server, b"{}")


def test_a_server_that_always_closes_is_asked_twice_and_no_more() -> None:
    with ScriptedServer([(reply(b"x"), "keep"), (b"", "close")]) as server:
        with pytest.raises(BadReply, match="without a reply"):
            ask(server, b"1", b"2")
        assert len(server.requests) == 3


def test_the_late_half_of_a_reply_does_not_answer_the_next_request() -> None:
    with ScriptedServer([(reply(b"late half")[:-4], "hang"), (reply(b"second"), "keep")]) as server:
        target = Target.of(server.url, {})

        async def exchange() -> Reply:
            connection = Connection(target)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await connection.ask(target.request(b"1"))
            answer = await connection.ask(target.request(b"2"))
            connection.close()
            return answer

        assert asyncio.run(exchange()).body == b"second"


def test_a_request_says_where_it_goes_and_how_long_it_is() -> None:
    target = Target.of("http://[::1]:81/prefix/embed?a=b", {"Authorization": "Bearer key"})
    assert (target.host, target.port, target.secure) == ("::1", 81, False)
    head, _, body = target.request(b'{"a":1}').partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /prefix/embed?a=b HTTP/1.1"
    assert {b"Host: [::1]:81", b"Authorization: Bearer key", b"Content-Length: 7"} <= set(lines)
    assert body == b'{"a":1}'
    assert Target.of("https://example.org", {}).port == 443


@pytest.mark.parametrize(
    ("url", "key", "words"),
    [
        ("localhost:8000", "k", "is no URL such as"),
        ("ftp://host/x", "k", "is no URL such as"),
        ("http://host:99999/x", "k", "is no URL such as"),
        ("http:///x", "k", "names no host"),
        ("http://host/x", "two\r\nlines", "printable ASCII"),
        ("http://host/ü", "k", "printable ASCII"),
    ],
)
def test_urls_and_keys_that_cannot_be_sent_are_refused(url: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Target.of(url, {"Authorization": key})
