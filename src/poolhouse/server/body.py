"""Request bodies: read within limits, parsed once."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import numpy as np
import orjson
from fastapi import Request

from poolhouse.server.errors import Disconnected, Refused, WrongContentType
from poolhouse.settings import ServerSettings

# Possessive, and a text that never ends goes to the end of the body: each byte is read once, whatever a body holds.
_TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
# Some programs of Windows begin every file with it.
_BOM = b"\xef\xbb\xbf"
# By how much each byte nests deeper.
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_TOO_SLOW = "The body did not arrive within {seconds:g} seconds."


async def read_json(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        Refused: another content type, too many bytes (known before they are all read), too slow, too deep, no JSON, no
            object. Disconnected: the client hung up within it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # LiteLLM tells Voyage's servers no type; what shows a key was not sent by a strange page in a browser.
    untold = not kind and "authorization" in request.headers
    if not untold and kind != "application/json" and not kind.endswith("+json"):
        raise WrongContentType(f"The content type must be application/json, got {kind or 'none'}.")
    raw = await read_bytes(request, settings)
    if _is_deep(raw, settings.max_json_depth):
        raise Refused(f"The body is nested deeper than {settings.max_json_depth} levels.", parameter="body")
    try:
        body = orjson.loads(raw.removeprefix(_BOM))
    except orjson.JSONDecodeError as error:
        raise Refused(f"The body is not valid JSON: {error}", parameter=f"body.{error.pos}") from None
    if not isinstance(body, dict):
        raise Refused("The body must be a JSON object.", parameter="body")
    return body


async def read_bytes(request: Request, settings: ServerSettings) -> bytes:
    """A body of any kind.

    Raises:
        Refused: too many bytes, too slow. Disconnected: the client hung up within it.
    """
    try:
        async with asyncio.timeout(settings.body_timeout_seconds):
            return await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise Refused(_TOO_SLOW.format(seconds=settings.body_timeout_seconds), 408) from None


async def _read(request: Request, most_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        size += len(part)
        if size > most_bytes:
            raise Refused(f"The body is larger than {most_bytes} bytes; send fewer or shorter inputs.", 413)
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_deep(raw: bytes, most: int) -> bool:
    """Whether brackets outside of texts nest deeper than that."""
    if raw.count(b"[") + raw.count(b"{") <= most:
        return False
    steps = _STEPS[np.frombuffer(_TEXTS.sub(b"", raw), np.uint8)]
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0)) > most
