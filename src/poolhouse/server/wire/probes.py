"""Probes: the paths where supervisors ask for health, and 503 for requests that come too early or too late."""

from __future__ import annotations

import json

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from poolhouse.server.security import path_of
from poolhouse.server.wire.errors import Failure, Shape

# Clients ask for health under these prefixes too.
_PREFIXES = ("", "/v1", "/v2", "/cohere", "/infinity", "/jina", "/tei", "/voyage")
# Paths that routes answer; those with a slash at the end, and other spellings, mean one of them.
_OWN = ("/health", "/health/live", "/health/ready", "/ping", "/tei/health", "/tei/ping", "/infinity/health")
# The path of a route for each path where clients ask for health; a slash at its end is left out.
SPELLINGS = {
    **{
        f"{prefix}{path}": path
        for prefix in _PREFIXES
        for path in ("/health", "/health/live", "/health/ready", "/ping")
    },
    "/healthz": "/health",
    "/livez": "/health/live",
    "/readyz": "/health/ready",
    **{path: path for path in _OWN},
}
# Seconds after which clients shall ask again.
_RETRY_SECONDS = 5


def report(status: int, state: str, reason: str | None = None) -> Response:
    """The reply to a probe."""
    state = json.dumps({"status": state} | ({} if reason is None else {"reason": reason}), separators=(",", ":"))
    return Response(state, status, media_type="application/json")


async def turn_away(scope: Scope, receive: Receive, send: Send, shape: Shape, state: str, message: str) -> None:
    """Answer a request that cannot be served now with 503; the process is alive nevertheless.

    state: what the server does instead, for `/health/ready`. message: the same as a sentence, for all other paths.
    """
    path = path_of(scope)
    if path == "/health/live":
        response = report(200, "live")
    elif path.endswith("/.well-known/live"):
        response = Response(status_code=204)
    elif path == "/health/ready":
        response = report(503, state)
    else:
        response = shape(Failure(503, message, "ServiceUnavailableError"))
    response.headers["retry-after"] = str(_RETRY_SECONDS)
    if state == "stopping":
        response.headers["connection"] = "close"
    await response(scope, receive, send)
