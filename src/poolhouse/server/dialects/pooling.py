"""vLLM's /pooling: the rows of any task."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import Field

from poolhouse.server.body import read_json
from poolhouse.server.dialects import vectors
from poolhouse.server.dialects.fields import Fields, body_schema
from poolhouse.server.serving import Serving
from poolhouse.tasks import parse_task


class PoolingFields(Fields):
    """The body of POST /pooling."""

    task: str | None = Field(
        None, description="embed, token_embed, classify or token_classify, as the model has it; none takes its first."
    )


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["pooling"])

    @routes.post("/pooling", openapi_extra=body_schema(PoolingFields))
    async def pooling(http: Request) -> Response:
        """One row, or one row per token, for each input."""
        fields = PoolingFields.model_validate(await read_json(http, serving.settings.max_body_bytes))
        engine = serving.engine(fields.model)
        task = engine.tasks[0] if fields.task is None else parse_task(fields.task, engine.tasks)
        return await vectors.reply(serving, http, fields, engine, task, prefix="pooling", kind="pooling", key="data")

    return routes
