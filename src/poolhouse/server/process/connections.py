"""Connections: uvicorn's HTTP protocol with limits on headers and slow readers; offers to upgrade are ignored.

Both of uvicorn's parsers work. The one in C has no limit for headers, and stops where a request offers an upgrade.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import sys
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poolhouse.engine.process import release_freed_memory
from poolhouse.settings import ServerSettings

# Bytes of a part, in which the body of a reply is handed to the connection.
_PART = 64 * 1024
# How often it is checked, within the time in which a client may read nothing, whether it reads.
_CHECKS = 5
# Where Linux's tcp_info counts the bytes that the other side has acknowledged.
_ACKED = slice(120, 128)


class Edge:
    """The outermost application: hands large bodies over as the client reads them, and refuses tunnels (501)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["method"] in ("CONNECT", "PRI"):
            # What follows is meant for another server, or is HTTP/2.
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 501, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, _in_parts(send))


def _in_parts(send: Send) -> Send:
    async def sent(message: Message) -> None:
        body = message.get("body", b"")
        if len(body) > _PART:
            view = memoryview(body)
            last = (len(body) - 1) // _PART * _PART
            for begin in range(0, last, _PART):
                part = bytes(view[begin : begin + _PART])
                await send({"type": "http.response.body", "body": part, "more_body": True})
            message = {**message, "body": bytes(view[last:])}
        await send(message)

    return sent


def bounded_protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which also ends connections whose headers are too large or too late, or whose reply is not read.

    Headers of more than `max_header_bytes` get 431; those that are not complete after `header_timeout_seconds` get 408. A
    connection is cut when nothing of a reply is read for `reply_timeout_seconds`. CONNECT gets 501; offers to upgrade are
    ignored, as RFC 9110 (7.8) allows.
    """
    protocol, parser = _uvicorn_protocol()
    max_bytes, seconds = settings.max_header_bytes, settings.header_timeout_seconds
    reply_seconds = settings.reply_timeout_seconds

    class Bounded(protocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if parser is not None:
                self.parser = parser(self)
            self.header_bytes = 0
            self.in_headers = False
            self.upgrade_offered = False
            self.deadline: asyncio.TimerHandle | None = self.loop.call_later(seconds, self._too_late)
            self.acknowledged = 0
            self.read_last = 0.0
            self.watch: asyncio.TimerHandle | None = None

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_deadline()
            self._stop_watching()
            super().connection_lost(error)

        def on_message_begin(self) -> None:
            self.in_headers = True
            self.upgrade_offered = False
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            if self.parser.should_upgrade():
                self.upgrade_offered = True
                return
            self.in_headers = False
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            if not self.upgrade_offered:
                super().on_message_complete()

        def data_received(self, data: bytes) -> None:
            before = self._awaits_headers()
            super().data_received(data)
            if not self._awaits_headers() or self.transport.is_closing():
                self._stop_deadline()
                return
            # What came with the end of the last body is not counted: it is little.
            self.header_bytes += len(data) if before else 0
            if self.header_bytes > max_bytes:
                self._end(b"431 Request Header Fields Too Large")
            elif self.deadline is None:
                self.deadline = self.loop.call_later(seconds, self._too_late)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.get_write_buffer_size():
                self._watch()

        def head_without_upgrade(self) -> bytes | None:
            """The request line and headers that were just read, without the offer; None where they cannot be answered."""
            method: bytes = self.parser.get_method()
            if method == b"CONNECT":
                self._end(b"501 Not Implemented")
                return None
            kept = [(name, value) for name, value in self.headers if name != b"upgrade"]
            lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
            return b"\r\n".join([*lines, *(b"%s: %s" % header for header in kept), b"", b""])

        def _unsupported_upgrade_warning(self) -> None:
            """Log nothing: whoever reads the log can do nothing about it."""

        def _awaits_headers(self) -> bool:
            """Whether headers are awaited: h11 has a state for it, httptools the two callbacks above."""
            if hasattr(self, "conn"):
                return self.conn.their_state is h11.IDLE
            return self.in_headers or self.cycle is None

        def _stop_deadline(self) -> None:
            self.header_bytes = 0
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def _too_late(self) -> None:
            self._end(b"408 Request Timeout")

        def _watch(self) -> None:
            """Check from now on whether the client reads."""
            self._stop_watching()
            self.acknowledged, self.read_last = _acknowledged(self.transport), self.loop.time()
            self.watch = self.loop.call_later(reply_seconds / _CHECKS, self._check_reading)

        def _check_reading(self) -> None:
            self.watch = None
            if not (self.transport.get_write_buffer_size() or self.flow.write_paused):
                return
            now, acknowledged = self.loop.time(), _acknowledged(self.transport)
            if acknowledged != self.acknowledged:
                self.acknowledged, self.read_last = acknowledged, now
            if now - self.read_last < reply_seconds:
                self.watch = self.loop.call_later(reply_seconds / _CHECKS, self._check_reading)
                return
            self.transport.abort()
            # The reply is freed once its task has ended; afterwards its memory goes back, whether other requests come or not.
            self.loop.call_later(1, self.loop.run_in_executor, None, release_freed_memory)

        def _stop_watching(self) -> None:
            if self.watch is not None:
                self.watch.cancel()
                self.watch = None

        def _end(self, status: bytes) -> None:
            self._stop_deadline()
            if not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 %s\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
                self.transport.close()

    return Bounded


def _acknowledged(transport: asyncio.Transport) -> int:
    """A number that grows as the client reads.

    The bytes that we have still to write would not do: the system takes more only when a third of its own buffer is free,
    which may be megabytes.
    """
    left = transport.get_write_buffer_size()
    connected = transport.get_extra_info("socket")
    try:
        with socket.socket(fileno=os.dup(connected.fileno())) as own:
            if own.family == socket.AF_UNIX:
                import fcntl
                import termios

                # What the client has not read of what the system has.
                return -left - int.from_bytes(fcntl.ioctl(own, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
            return int.from_bytes(
                own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.stop)[_ACKED], sys.byteorder
            )
    except (AttributeError, OSError):
        # Another system than Linux, or a closed socket.
        return -left


def _uvicorn_protocol() -> tuple[Any, Any]:
    """The protocol over the parser written in C where that is installed, as uvicorn chooses, and our parser for it.

    h11 reads a body that comes with an offer by itself, and needs no parser of ours.
    """
    try:
        module = importlib.import_module("uvicorn.protocols.http.httptools_impl")
    except ImportError:
        return importlib.import_module("uvicorn.protocols.http.h11_impl").H11Protocol, None
    base: Any = module.httptools.HttpRequestParser

    class Parser(base):  # type: ignore[misc]
        """Goes on where llhttp stops, which takes what follows headers with an offer for another protocol."""

        def __init__(self, protocol: Any) -> None:
            self.protocol = protocol
            self._begin()

        def feed_data(self, data: bytes) -> None:
            while True:
                try:
                    super().feed_data(data)
                    return
                except module.httptools.HttpParserUpgrade as offer:
                    head = self.protocol.head_without_upgrade()
                    if head is None:
                        return
                    self._begin()
                    data = head + data[offer.args[0] :]

        def _begin(self) -> None:
            super().__init__(self.protocol)
            # As uvicorn does: what follows a request with `connection: close` is no error.
            self.set_dangerous_leniencies(lenient_data_after_close=True)

    return module.HttpToolsProtocol, Parser
