"""Request bodies: read within a limit, parsed once."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Request

from poolhouse.server.errors import BadBody


async def read_json(request: Request, most_bytes: int) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        BadBody: another content type, too many bytes (known before they are all read), no JSON, no object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise BadBody(f"The content type must be application/json, got {kind or 'none'}.")
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            raise BadBody(f"The body is larger than {most_bytes} bytes; send fewer or shorter inputs.", 413)
        parts.append(part)
    try:
        body = orjson.loads(b"".join(parts))
    except orjson.JSONDecodeError as error:
        raise BadBody(f"The body is not valid JSON: {error}", parameter=f"body.{error.pos}") from None
    if not isinstance(body, dict):
        raise BadBody("The body must be a JSON object.", parameter="body")
    return body
