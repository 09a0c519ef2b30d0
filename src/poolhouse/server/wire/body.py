"""Body of a request: read within limits, unpacked and parsed once."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import orjson
from starlette.requests import Request

from poolhouse.server.wire.errors import Disconnected, Refused, Unread, WrongContentType
from poolhouse.settings import ServerSettings

# Possessive, and a string that never ends goes to the end of the body: each byte is read once, whatever a body holds.
_TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
# Some programs on Windows begin every file with it.
_BOM = b"\xef\xbb\xbf"
# How much deeper each byte nests.
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_TOO_SLOW = "The body did not arrive within {seconds:g} seconds."
_TOO_LARGE = "The body is larger than {bytes} bytes{unpacked}; send fewer or shorter inputs."
# A surrogate without its other half, where escaped backslashes are replaced already.
_HALF = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
# Names of fields, and what looks like them inside strings. It begins with the quote, for which a data URI is searched fast.
_FIELD_NAMES = re.compile(rb'"(?<!\\")\s*:')
# A body of fewer bytes is checked on the event loop: that takes less time than handing it to a thread.
_SMALL = 65536
# What Python writes for numbers that JSON does not have.
_NO_NUMBER = re.compile(r"-?(?:NaN|Infinity)")
# Content codings on top of each other.
_MAX_CODINGS = 4
# gzip and zstd bodies may be several streams end to end; what is left after each is copied.
_MAX_MEMBERS = 16
# The largest window that RFC 9659 allows; a larger one would let the sender choose how much memory is used.
_ZSTD_WINDOW_BITS = 23


async def read_json(request: Request, settings: ServerSettings) -> dict[str, object]:
    """The JSON object of a body, without its nulls: a field that is null is one left out.

    Raises:
        Refused: another content type, coding or charset, too many bytes (known before they are all read or unpacked), too
            slow, too deep, no JSON, no object, a name that stands twice. Disconnected: the client hung up within it.
    """
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    # LiteLLM sends Voyage's servers no type; a request with a key was not sent by a foreign page in a browser.
    no_type = not kind and "authorization" in request.headers
    if not no_type and kind != "application/json" and not kind.endswith("+json"):
        raise WrongContentType(f"The content type must be application/json, got {kind or 'none'}.")
    raw = _in_utf8(await read_bytes(request, settings))
    if _is_deep(raw, settings.max_json_depth):
        raise Refused(f"The body is nested deeper than {settings.max_json_depth} levels.", parameter="body")
    body = _parsed(raw, content_type)
    if not isinstance(body, dict):
        raise Refused("The body must be a JSON object.", parameter="body")
    names = len(_FIELD_NAMES.findall(raw))
    if names > len(body) and not (
        _has_names(body, names) if len(raw) < _SMALL else await asyncio.to_thread(_has_names, body, names)
    ):
        name = await asyncio.to_thread(_twice, raw)
        if name is not None:
            raise Refused(
                f"The body names {name!r} twice in one object; which of them counts?", parameter=f"body.{name}"
            )
    return without_nulls(body)


def without_nulls(body: Mapping[str, object]) -> dict[str, object]:
    """The fields of a body that are not null; clients write null where the server shall decide."""
    return {name: value for name, value in body.items() if value is not None}


async def read_bytes(request: Request, settings: ServerSettings) -> bytes:
    """A body of any kind, unpacked.

    Raises:
        Refused: too many bytes, too slow, or a packing that is not known here or broken. Disconnected: the client hung
            up within it.
    """
    codings = _codings(request.headers.getlist("content-encoding"))
    try:
        async with asyncio.timeout(settings.body_timeout_seconds):
            raw = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise Refused(_TOO_SLOW.format(seconds=settings.body_timeout_seconds), 408) from None
    for coding in reversed(codings):
        raw = await asyncio.to_thread(_unpacked, raw, coding, settings.max_body_bytes)
    return raw


async def _read(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise Refused(_TOO_LARGE.format(bytes=max_bytes, unpacked=""), 413)
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _codings(headers: list[str]) -> list[str]:
    """The content codings of a body, in the order in which they were applied.

    Raises:
        Unread: one that is not read here, or too many.
    """
    # Some programs name the charset here.
    nothing = ("", "identity", "utf-8", "utf8")
    named = [coding.strip().lower() for header in headers for coding in header.split(",")]
    codings = [coding.replace("x-gzip", "gzip") for coding in named if coding not in nothing]
    for coding in codings:
        if coding not in _DECODERS:
            raise Unread(f"The content encoding {coding[:50]!r} is not read here.", _DECODERS)
    if len(codings) > _MAX_CODINGS:
        raise Unread(f"The body is packed {len(codings)} times; {_MAX_CODINGS} are read.", _DECODERS)
    return codings


class _Decoder(Protocol):
    """Unpacks one stream of a body, as zlib's and zstd's decompressors do."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Brotli:
    """brotli's decompressor with zlib's interface; it refuses bytes behind the end of the stream."""

    unused_data = b""

    def __init__(self) -> None:
        import brotli

        self._inside = brotli.Decompressor()
        self._error = brotli.error

    @property
    def eof(self) -> bool:
        return bool(self._inside.is_finished())

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        try:
            return bytes(self._inside.process(data, output_buffer_limit=max_length))
        except self._error as error:
            raise ValueError(str(error)) from None


class _Zstd:
    """zstd's decompressor, with bounded memory."""

    def __init__(self) -> None:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd

        self._inside = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_BITS})
        self._error = zstd.ZstdError

    @property
    def eof(self) -> bool:
        return self._inside.eof

    @property
    def unused_data(self) -> bytes:
        return self._inside.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        try:
            return self._inside.decompress(data, max_length)
        except self._error as error:
            raise ValueError(str(error)) from None


def _deflate(data: bytes) -> _Decoder:
    """deflate is zlib's format; some programs send the bare stream."""
    wrapped = len(data) > 1 and data[0] & 15 == 8 and int.from_bytes(data[:2]) % 31 == 0
    return zlib.decompressobj(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)


def _gzip(_: bytes) -> _Decoder:
    return zlib.decompressobj(zlib.MAX_WBITS | 16)


# A decoder for a stream that begins with these bytes.
_DECODERS: Mapping[str, Callable[[bytes], _Decoder]] = {
    "gzip": _gzip,
    "deflate": _deflate,
    "br": lambda _: _Brotli(),
    "zstd": lambda _: _Zstd(),
}


def _unpacked(packed: bytes, coding: str, max_bytes: int) -> bytes:
    """The body without one coding; never more than the limit is unpacked.

    Raises:
        Refused: too large; cut short or corrupt.
    """
    parts: list[bytes] = []
    room = max_bytes
    for _ in range(_MAX_MEMBERS):
        decoder = _DECODERS[coding](packed)
        try:
            part = decoder.decompress(packed, room + 1)
        except (zlib.error, ValueError, EOFError) as error:
            raise Refused(f"The body is not valid {coding}: {error}", parameter="body") from None
        room -= len(part)
        if room < 0:
            raise Refused(_TOO_LARGE.format(bytes=max_bytes, unpacked=" once unpacked"), 413)
        parts.append(part)
        if not decoder.eof:
            raise Refused(f"The body is not valid {coding}: it ends too early.", parameter="body")
        packed = decoder.unused_data
        if not packed:
            return b"".join(parts)
        if coding == "deflate":
            raise Refused("The body is not valid deflate: it goes on after its end.", parameter="body")
    raise Refused(f"The body is more than {_MAX_MEMBERS} {coding} streams end to end.", parameter="body")


def _in_utf8(raw: bytes) -> bytes:
    """The body in UTF-8, without a byte order mark; JSON begins with ASCII, so its first bytes show the encoding."""
    encoding = json.detect_encoding(raw)
    if encoding.startswith("utf-8"):
        return raw.removeprefix(_BOM)
    try:
        return raw.decode(encoding).encode()
    except UnicodeDecodeError as error:
        raise Refused(f"The body is not valid {encoding}: {error.reason}", parameter=f"body.{error.start}") from None


def _parsed(raw: bytes, content_type: str) -> object:
    """The JSON value; half a surrogate pair is read as U+FFFD, which JavaScript would have sent in its place."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        whole = _with_whole_surrogates(raw)
        if whole != raw:
            return _parsed(whole, content_type)
        raise _no_json(raw, content_type, error) from None


def _with_whole_surrogates(raw: bytes) -> bytes:
    """The body with U+FFFD for each escaped half of a pair that stands alone; each is as long as what it replaces."""
    if b"\0" in raw:
        return raw  # no JSON, and it would be taken for our mark of escaped backslashes
    return _HALF.sub(rb"\\ufffd", raw.replace(rb"\\", b"\0\0")).replace(b"\0\0", rb"\\")


def _no_json(raw: bytes, content_type: str, error: orjson.JSONDecodeError) -> Refused:
    try:
        text = raw.decode()
    except UnicodeDecodeError as wrong:
        charset = re.search(r'charset\s*=\s*"?([^\s;"]+)', content_type, re.IGNORECASE)
        if charset is not None and charset[1].lower() not in ("utf-8", "utf8"):
            return Unread(f"The body is {charset[1][:50]}; JSON is sent in UTF-8 (or UTF-16, UTF-32).")
        return Refused(
            f"The body is not valid JSON: byte 0x{raw[wrong.start]:02x} at {wrong.start} is not UTF-8.",
            parameter=f"body.{wrong.start}",
        )
    number = _NO_NUMBER.match(text, max(error.pos - 1, 0)) or _NO_NUMBER.match(text, error.pos)
    message = str(error) if number is None else f"{number[0]} is no number of JSON (char {number.start()})"
    near = text[max(error.pos - 30, 0) : error.pos + 10]
    return Refused(f"The body is not valid JSON: {message}, near {near!r}", parameter=f"body.{error.pos}")


def _has_names(body: dict[str, Any], names: int) -> bool:
    """Whether the objects of a body have so many names in all; small objects are counted first."""
    count = 0
    rest: list[dict[str, object] | list[object]] = [body]
    while rest and count < names:
        value = rest.pop()
        count += len(value) if isinstance(value, dict) else 0
        values = value.values() if isinstance(value, dict) else value
        nested = (inner for inner in values if inner and isinstance(inner, dict | list))
        rest.extend(sorted(nested, key=len, reverse=True))
    return count >= names


def _twice(raw: bytes) -> str | None:
    """The first name that stands twice in an object, cut where it is long; None where all are different."""
    found: list[str] = []

    def note(pairs: list[tuple[str, object]]) -> None:
        if not found:
            found.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)

    json.loads(raw, object_pairs_hook=note)
    return found[0][:100] if found else None


def _is_deep(raw: bytes, max_depth: int) -> bool:
    """Whether brackets outside of strings nest deeper than that."""
    if raw.count(b"[") + raw.count(b"{") <= max_depth:
        return False
    steps = _STEPS[np.frombuffer(_TEXTS.sub(b"", raw), np.uint8)]
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0)) > max_depth
