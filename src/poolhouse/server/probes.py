"""What supervisors ask: is the process alive, and may it be sent requests?"""

from __future__ import annotations

from fastapi import APIRouter, Response

from poolhouse.server.serving import Serving


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["server"])

    @routes.get("/health/live")
    async def live() -> Response:
        """200 as long as the process answers."""
        return report(200, "live")

    @routes.get("/health/ready")
    async def ready() -> Response:
        """200 while every engine can answer, else 503."""
        alive = all(engine.alive for engine in serving.engines.values())
        return report(200, "ready") if alive else report(503, "failed")

    return routes


def report(status: int, word: str) -> Response:
    """The body of a probe."""
    return Response(f'{{"status":"{word}"}}', status, media_type="application/json")
