"""Azure OpenAI: OpenAI's embeddings and models under /openai, where a deployment is a served model.

Source: Azure's REST reference. `api-version` is not looked at; keys come in `api-key`, as on every route.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from poolhouse.server.dialects import health, openai
from poolhouse.server.dialects._fields import body_schema
from poolhouse.server.dialects.health import Model, Models
from poolhouse.server.dialects.openai import BYTES, METADATA, EmbeddingFields, EmbeddingReply
from poolhouse.server.engines import Serving
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.body import read_json
from poolhouse.server.wire.contract import Contract, Contracts, Errors, NestedError
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import nested, speak

shape = nested


def router(serving: Serving) -> APIRouter:
    routes = direct_router("azure", "/openai")

    @routes.post("/deployments/{deployment:path}/embeddings", openapi_extra=body_schema(EmbeddingFields))
    async def of_deployment(http: Request) -> Response:
        """One vector per input, of the model that the path names."""
        speak(http, shape)
        body = {**await read_json(http, serving.settings), "model": http.path_params["deployment"]}
        return await openai.answer(serving, http, serving.parse(body, EmbeddingFields))

    @routes.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingFields))
    async def embeddings(http: Request) -> Response:
        """One vector per input."""
        speak(http, shape)
        return await openai.answer(serving, http, await serving.read(http, EmbeddingFields))

    @routes.get("/v1/models")
    @routes.get("/models", include_in_schema=False)
    async def models(_: Request) -> Response:
        """The served models."""
        return Response(dumps(health.listed(serving)), media_type="application/json")

    @routes.get("/v1/models/{model:path}")
    @routes.get("/models/{model:path}", include_in_schema=False)
    async def model(http: Request) -> Response:
        """One of the served models, by any of its names."""
        speak(http, shape)
        return Response(dumps(health.found(serving, http.path_params["model"])), media_type="application/json")

    return routes


_ERRORS = (Errors(NestedError),)
_EMBEDDINGS = Contract((EmbeddingReply,), _ERRORS, BYTES, METADATA)
CONTRACTS: Contracts = {
    "/openai/deployments/{deployment}/embeddings": _EMBEDDINGS,
    "/openai/v1/embeddings": _EMBEDDINGS,
    "/openai/v1/models": Contract((Models,), ()),
    "/openai/v1/models/{model}": Contract((Model,), (Errors(NestedError, (404,)),)),
}
