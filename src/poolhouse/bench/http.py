"""HTTP for measuring servers: one kept-alive HTTP/1.1 connection that posts JSON.

A load generator shares its cores with the server that it measures: a request costs 0.05 ms of processor time here,
and costs httpx 2 ms. aiohttp would bring ten packages for the little that is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from poolhouse.errors import ConfigError

# Longest headers of a reply; some servers put facts of every item into one.
_LONGEST_HEAD = 1 << 20
_PORTS = {"http": 80, "https": 443}


class BadReply(Exception):
    """Bytes that are no reply of HTTP/1.1, or a reply that ends too early."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; `size` counts the bytes of headers and body as they were sent."""

    status: int
    body: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: host, port, whether TLS is spoken, and the first line and headers of every request (`head`)."""

    host: str
    port: int
    secure: bool
    head: bytes

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str]) -> Target:
        """The target of a URL.

        Raises:
            ConfigError: no http or https URL, or a header that would break the request.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS[parts.scheme]
        except (ValueError, KeyError):
            raise ConfigError(f"{url!r} is no URL such as http://127.0.0.1:8000.") from None
        if not parts.hostname:
            raise ConfigError(f"{url!r} names no host; write http://127.0.0.1:8000.")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "Content-Type: application/json",
            "Accept-Encoding: identity",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if any(not line.isascii() or not line.isprintable() for line in lines):
            raise ConfigError("The URL and the API key must be printable ASCII.")
        return cls(parts.hostname, port, parts.scheme == "https", "\r\n".join(lines).encode())

    def request(self, body: bytes) -> bytes:
        """The bytes of a request with this body."""
        return b"%s\r\nContent-Length: %d\r\n\r\n%s" % (self.head, len(body), body)


class Connection:
    """A connection that is opened when it is needed, and kept for the next request where the server lets it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> Reply:
        """Send the bytes of a request and read its reply; a kept connection that the server closed meanwhile is opened anew.

        Raises:
            OSError: no connection, or one that broke.
            BadReply: no HTTP/1.1, or a reply that ends too early.
        """
        kept = self._streams is not None
        try:
            try:
                return await self._exchange(request)
            except _ClosedUnanswered:
                if not kept:
                    raise
                self.close()
                return await self._exchange(request)
        except BaseException:
            # What is left of this exchange, in either direction, must not meet the next one.
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            with contextlib.suppress(RuntimeError):
                self._streams[1].transport.abort()
            self._streams = None

    async def _exchange(self, request: bytes) -> Reply:
        if self._streams is None:
            context = ssl.create_default_context() if self.target.secure else None
            self._streams = await asyncio.open_connection(
                self.target.host, self.target.port, ssl=context, limit=_LONGEST_HEAD
            )
        reader, writer = self._streams
        writer.write(request)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise BadReply("The reply ends in its head.") from None
            raise _ClosedUnanswered("The server closed the connection without a reply.") from None
        except ConnectionError as error:
            raise _ClosedUnanswered(f"The connection broke before a reply: {error}") from None
        except asyncio.LimitOverrunError:
            raise BadReply(f"The reply's head is longer than {_LONGEST_HEAD} bytes.") from None
        version, status, fields = _parsed(head)
        try:
            body, size = await _body(reader, status, fields)
        except asyncio.IncompleteReadError:
            raise BadReply("The server closed the connection in the middle of a reply.") from None
        if version != b"HTTP/1.1" or fields.get(b"connection", b"").lower() == b"close" or reader.at_eof():
            self.close()
        return Reply(status, body, len(head) + size)


class _ClosedUnanswered(BadReply):
    """The connection ended before the first byte of a reply."""


def _parsed(head: bytes) -> tuple[bytes, int, dict[bytes, bytes]]:
    """Version, status, and fields by lower-case name."""
    first, *lines = head[:-4].split(b"\r\n")
    version, _, rest = first.partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise BadReply(f"The reply is no HTTP/1.1; it begins with {first[:40]!r}.")
    fields = {}
    for line in lines:
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip()
    return version, int(rest[:3]), fields


async def _body(reader: asyncio.StreamReader, status: int, fields: Mapping[bytes, bytes]) -> tuple[bytes, int]:
    """The body, and its bytes on the wire (RFC 9112, 6.3)."""
    if status == 204:
        return b"", 0
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        return await _chunks(reader)
    length = fields.get(b"content-length")
    if length is None:
        body = await reader.read()
    elif length.isdigit():
        body = await reader.readexactly(int(length))
    else:
        raise BadReply(f"The reply's content-length is {length!r}.")
    return body, len(body)


async def _chunks(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    """A body in chunks (RFC 9112, 7.1); fields after the last one are read over."""
    parts: list[bytes] = []
    size = 0
    while True:
        line = await reader.readuntil(b"\r\n")
        size += len(line)
        try:
            length = int(line.partition(b";")[0], 16)
        except ValueError:
            raise BadReply(f"A chunk of the reply begins with {line[:40]!r}.") from None
        if length == 0:
            break
        part = await reader.readexactly(length + 2)
        size += len(part)
        parts.append(part[:-2])
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        size += len(line)
    return b"".join(parts), size + len(line)
