"""Dialects: each turns its bodies into requests and answers into its bodies. A new one is a file and a line here."""

from __future__ import annotations

from fastapi import APIRouter

from poolhouse.server.dialects import classify, health, openai, pooling, rerank, score, tei
from poolhouse.server.serving import Serving


def routers(serving: Serving) -> list[APIRouter]:
    """The routes of every dialect over these engines."""
    dialects = (health, openai, pooling, classify, score, rerank, tei)
    return [*(dialect.router(serving) for dialect in dialects), tei.prefixed_router(serving)]
