"""OpenAI's embeddings, with the fields that vLLM added."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from poolhouse.errors import UnsupportedTask
from poolhouse.server.body import read_json
from poolhouse.server.dialects import vectors
from poolhouse.server.dialects.fields import Fields, body_schema
from poolhouse.server.serving import Serving


class EmbeddingFields(Fields):
    """The body of POST /v1/embeddings."""


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["embeddings"])

    @routes.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingFields))
    @routes.post("/embeddings", include_in_schema=False)
    async def embeddings(http: Request) -> Response:
        """One vector per input."""
        fields = EmbeddingFields.model_validate(await read_json(http, serving.settings.max_body_bytes))
        engine = serving.engine(fields.model)
        if "embed" not in engine.tasks:
            raise UnsupportedTask("The model does not support Embeddings API", "model", engine.name)
        return await vectors.reply(
            serving, http, fields, engine, "embed", prefix="embd", kind="embedding", key="embedding"
        )

    return routes
