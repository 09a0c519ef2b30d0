"""Routes about the server itself."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Response
from typing_extensions import TypedDict

import poolhouse
from poolhouse.engine.interface import PoolingEngine
from poolhouse.errors import UnknownModel
from poolhouse.server.engines import Serving
from poolhouse.server.wire.contract import Contract, Contracts, Errors
from poolhouse.server.wire.probes import report
from poolhouse.tasks import Task


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["server"])

    async def health() -> Response:
        """200 while every engine can answer, else 503."""
        return answer(serving)

    routes.add_api_route("/health", health, methods=["GET"])
    routes.add_api_route("/ping", health, methods=["GET", "POST"], include_in_schema=False)

    @routes.get("/health/live")
    @routes.get("/v1/health/live", include_in_schema=False)
    async def live() -> Response:
        """200 as long as the process answers."""
        return report(200, "live")

    @routes.get("/health/ready")
    @routes.get("/v1/health/ready", include_in_schema=False)
    async def ready() -> Response:
        """200 while every engine can answer, else 503."""
        return report(200, "ready") if _ready(serving) else report(503, "failed")

    @routes.get("/load")
    async def load() -> dict[str, int]:
        """How many prompts wait or run."""
        return {"server_load": serving.load}

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """The version of Poolhouse."""
        return {"version": poolhouse.__version__}

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' text format."""
        # Some milliseconds of work: requests need not wait for it.
        text = await asyncio.to_thread(serving.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/v1/models")
    async def models() -> dict[str, object]:
        """The served models, with the tasks and the limit of each."""
        return listed(serving)

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, object]:
        """One of the served models, by any of its names."""
        return found(serving, model)

    return routes


def listed(serving: Serving) -> dict[str, object]:
    """The served models and adapters, as OpenAI lists them."""
    return {"object": "list", "data": [about(serving, name) for name in serving.engines]}


def found(serving: Serving, name: str) -> dict[str, object]:
    """The model of that name; all of them where a path ends before it.

    Raises:
        UnknownModel: there is none; its message names those there are.
    """
    if name == "":
        return listed(serving)
    try:
        return about(serving, name)
    except UnknownModel as error:
        raise UnknownModel(str(error), "model", name) from None


def about(serving: Serving, name: str) -> dict[str, object]:
    """What is told of a served model, under any of its names."""
    engine, settings = serving.engine(name), serving.settings
    return {
        "id": name,
        "object": "model",
        "created": serving.started,
        "owned_by": "poolhouse",
        "root": engine.facts.name,
        "parent": engine.facts.parent,
        "max_model_len": engine.facts.max_tokens,
        "model_type": _model_type(engine),
        "tasks": list(engine.facts.tasks),
        "prompts": sorted(engine.facts.prompts),
        "limits": {
            "max_client_batch_size": settings.max_client_batch_size,
            "max_queued_prompts": settings.max_queued_prompts,
            "max_body_bytes": settings.max_body_bytes,
            "request_timeout_seconds": settings.request_timeout_seconds,
        },
        "permission": [],
    }


def answer(serving: Serving) -> Response:
    """An empty 200 while every engine can answer, else an empty 503."""
    return Response(status_code=200 if _ready(serving) else 503)


def _model_type(engine: PoolingEngine) -> str:
    """Xinference's word, by which its clients choose what to ask."""
    if "classify" in engine.facts.tasks and engine.facts.labels == 1:
        return "rerank"
    return "embedding" if {"embed", "token_embed"} & set(engine.facts.tasks) else "classifier"


def _ready(serving: Serving) -> bool:
    return all(engine.alive for engine in serving.engines.values())


class Probe(TypedDict):
    """What a supervisor hears."""

    status: Literal["live", "ready", "loading", "failed"]


class Load(TypedDict):
    """Prompts that wait or run."""

    server_load: int


class Version(TypedDict):
    """The version of Poolhouse."""

    version: str


class Limits(TypedDict):
    """What one request may ask."""

    max_client_batch_size: int
    max_queued_prompts: int
    max_body_bytes: int
    request_timeout_seconds: float


class Model(TypedDict):
    """A served model, or an adapter of one."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    model_type: Literal["embedding", "rerank", "classifier"]
    tasks: list[Task]
    prompts: list[str]
    limits: Limits
    permission: list[Any]


class Models(TypedDict):
    """The served models."""

    object: Literal["list"]
    data: list[Model]


CONTRACTS: Contracts = {
    "/health": Contract((), (Errors(None, (503,)),)),
    "/health/live": Contract((Probe,), ()),
    "/health/ready": Contract((Probe,), (Errors(Probe, (503,)),)),
    "/load": Contract((Load,), ()),
    "/version": Contract((Version,), ()),
    "/metrics": Contract((), (), ("text/plain",)),
    "/v1/models": Contract((Models,), ()),
    "/v1/models/{model}": Contract((Model,), (Errors(statuses=(404,)),)),
}
