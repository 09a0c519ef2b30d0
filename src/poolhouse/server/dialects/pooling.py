"""vLLM's /pooling: the rows of any task."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import Field

from poolhouse.server.dialects import vectors
from poolhouse.server.dialects.fields import body_schema
from poolhouse.server.dialects.routing import direct_router
from poolhouse.server.dialects.vectors import VectorFields
from poolhouse.server.serving import Serving
from poolhouse.tasks import parse_task


class PoolingFields(VectorFields):
    """The body of POST /pooling."""

    task: str | None = Field(
        None, description="embed, token_embed, classify or token_classify, as the model has it; none takes its first."
    )


def router(serving: Serving) -> APIRouter:
    routes = direct_router("pooling")

    @routes.post("/pooling", openapi_extra=body_schema(PoolingFields))
    async def pooling(http: Request) -> Response:
        """One row, or one row per token, for each input."""
        fields = await serving.read(http, PoolingFields)
        engine = serving.engine(fields.model)
        task = engine.tasks[0] if fields.task is None else parse_task(fields.task, engine.tasks)
        return await vectors.reply(serving, http, fields, engine, task, prefix="pooling", kind="pooling", key="data")

    return routes
