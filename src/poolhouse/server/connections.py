"""Connections that bound the head of a request, which uvicorn's fastest parser does not."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

import h11

from poolhouse.settings import ServerSettings


def bounded_protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which also ends connections whose head is too large or too late.

    A head of more than `max_header_bytes` hears 431; one that is not complete after `header_timeout_seconds` hears 408.
    """
    protocol = _uvicorns_own()
    most, seconds = settings.max_header_bytes, settings.header_timeout_seconds

    class Bounded(protocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.head_bytes = 0
            self.head_open = False
            self.deadline: asyncio.TimerHandle | None = self.loop.call_later(seconds, self._too_late)

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_the_clock()
            super().connection_lost(error)

        def on_message_begin(self) -> None:
            self.head_open = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.head_open = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            before = self._within_head()
            super().data_received(data)
            if not self._within_head() or self.transport.is_closing():
                self._stop_the_clock()
                return
            # What came with the end of the last body is not counted: it is little.
            self.head_bytes += len(data) if before else 0
            if self.head_bytes > most:
                self._end(b"431 Request Header Fields Too Large")
            elif self.deadline is None:
                self.deadline = self.loop.call_later(seconds, self._too_late)

        def _within_head(self) -> bool:
            """Whether headers are awaited: h11 says so by its state, httptools by the two callbacks above."""
            if hasattr(self, "conn"):
                return self.conn.their_state is h11.IDLE
            return self.head_open or self.cycle is None

        def _stop_the_clock(self) -> None:
            self.head_bytes = 0
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def _too_late(self) -> None:
            self._end(b"408 Request Timeout")

        def _end(self, status: bytes) -> None:
            self._stop_the_clock()
            if not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 %s\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
                self.transport.close()

    return Bounded


def _uvicorns_own() -> Any:
    """The parser written in C where it is installed, as uvicorn chooses."""
    try:
        module = importlib.import_module("uvicorn.protocols.http.httptools_impl")
    except ImportError:
        module = importlib.import_module("uvicorn.protocols.http.h11_impl")
        return module.H11Protocol
    return module.HttpToolsProtocol
