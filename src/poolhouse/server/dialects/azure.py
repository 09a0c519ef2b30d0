"""Azure OpenAI: OpenAI's embeddings and models under /openai, where a deployment is a served model.

Source: Azure's REST reference. `api-version` is not looked at; keys come in `api-key`, as on every route.
"""

from __future__ import annotations

from starlette.responses import Response

from poolhouse.server.call import Call, JsonObject
from poolhouse.server.dialects import openai
from poolhouse.server.dialects.health import Model, Models, model, models
from poolhouse.server.dialects.openai import BYTES, METADATA, EmbeddingFields, EmbeddingReply, embeddings
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.contract import Errors, NestedError
from poolhouse.server.wire.errors import nested


async def of_deployment(call: Call, body: JsonObject) -> Response:
    """One vector per input, of the model that the path names."""
    named = {**body, "model": call.path_params["deployment"]}
    return await openai.embeddings(call, call.parse(named, EmbeddingFields))


DIALECT = Dialect(
    "azure",
    (
        Route(
            "POST",
            "/deployments/{deployment:path}/embeddings",
            of_deployment,
            (EmbeddingFields,),
            (EmbeddingReply,),
            media=BYTES,
            headers=METADATA,
        ),
        Route("POST", "/v1/embeddings", embeddings, EmbeddingFields, (EmbeddingReply,), media=BYTES, headers=METADATA),
        Route("GET", "/v1/models", models, replies=(Models,), errors=(), others=("/models",)),
        Route(
            "GET",
            "/v1/models/{model:path}",
            model,
            replies=(Model,),
            errors=(Errors(NestedError, (404,)),),
            others=("/models/{model:path}",),
        ),
    ),
    nested,
    (Errors(NestedError),),
    prefix="/openai",
    owns=("/openai",),
)
