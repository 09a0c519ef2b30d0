"""What probes of supervisors hear."""

from __future__ import annotations

from fastapi import Response


def report(status: int, word: str) -> Response:
    """The body of a probe."""
    return Response(f'{{"status":"{word}"}}', status, media_type="application/json")
