"""OpenAI's embeddings, with the fields that vLLM added."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.server.dialects import chunked, vectors
from poolhouse.server.dialects.fields import body_schema
from poolhouse.server.dialects.routing import direct_router
from poolhouse.server.dialects.synonyms import in_our_words
from poolhouse.server.dialects.vectors import VectorFields
from poolhouse.server.serving import Engine, Serving
from poolhouse.tasks import Task, parse_task


class EmbeddingFields(VectorFields):
    """The body of POST /v1/embeddings; fields of Jina's, Voyage's and NVIDIA's APIs mean what they mean there."""

    task: str | None = Field(
        None,
        description='A task adapter of the checkpoint ("retrieval.query"), with the prompt stored under its name; '
        "where no adapters were named at start, as input_type.",
    )

    late_chunking: bool = Field(
        False, description="The inputs are the chunks of one text, each read with what stands around it."
    )

    @model_validator(mode="before")
    @classmethod
    def _understand_other_apis(cls, body: Any) -> Any:
        return in_our_words(body) if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _refuse_two_adapters(self) -> EmbeddingFields:
        if self._names_a_use and self.adapter is not None:
            raise ValueError("adapter and task both choose an adapter; give one of them.")
        return self

    @property
    def _names_a_use(self) -> bool:
        # Clients that name a pooling task here mean that.
        return self.task not in (None, "embed", "token_embed")

    def pooling_task(self, engine: Engine) -> Task:
        """A vector per input, or one per token or chunk: as the fields ask, else as the model answers first.

        Raises:
            UnsupportedTask: it has neither.
        """
        asked: Task = "token_embed" if self.late_chunking_params is not None else "embed"
        if self.task in ("embed", "token_embed"):
            asked = parse_task(self.task, ("embed", "token_embed"))
        elif engine.tasks[0] == "token_embed":
            asked = "token_embed"
        if asked not in engine.tasks:
            raise UnsupportedTask("The model does not support Embeddings API", "model", engine.name)
        return asked

    def apply_task(self, engine: Engine) -> None:
        """Make of `task` an adapter where adapters were named at start, else what an input type means."""
        if self._names_a_use and engine.adapters:
            self.adapter = self.task
        elif self._names_a_use and self.input_type is None:
            self.input_type = self.task


def router(serving: Serving) -> APIRouter:
    routes = direct_router("embeddings")

    @routes.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingFields))
    async def embeddings(http: Request) -> Response:
        """One vector per input."""
        return await answer(serving, http, await serving.read(http, EmbeddingFields))

    return routes


async def answer(serving: Serving, http: Request, fields: EmbeddingFields) -> Response:
    """The reply to a body of /v1/embeddings."""
    engine = serving.engine(fields.model)
    task = fields.pooling_task(engine)
    fields.apply_task(engine)
    requests = fields.requests(serving, task, fields.params())
    names = vectors.Names("embd", "embedding", "embedding")
    if fields.late_chunking:
        if task != "embed":
            raise InvalidRequest("late_chunking gives a vector per input; it is for the task embed.", "late_chunking")
        read = await chunked.read(serving, http, engine, requests)
        how = fields.how(engine, "embed")
        return await vectors.write(serving, http, fields, engine, [read.whole], read.chunks, names, how)
    return await vectors.reply(serving, http, fields, engine, requests, names)
