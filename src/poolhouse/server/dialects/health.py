"""Health: routes about the server itself: probes, load, metrics, served models."""

from __future__ import annotations

import asyncio
from typing import Literal, NotRequired

from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import EngineFacts, Replicated
from poolhouse.errors import UnknownModel
from poolhouse.plans.zero_shot import takes_labels
from poolhouse.server.call import Call, as_json
from poolhouse.server.engines import Engines
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.served import Listed, State
from poolhouse.server.wire.contract import Errors
from poolhouse.server.wire.probes import report
from poolhouse.tasks import Task
from poolhouse.version import __version__


async def health(call: Call) -> Response:
    """200 while every engine can answer, else 503."""
    return answer(call.engines)


async def live(call: Call) -> Response:
    """200 as long as the process answers."""
    return report(200, "live")


async def ready(call: Call) -> Response:
    """200 while every engine can answer, else 503."""
    if not call.engines.alive:
        return report(503, "failed")
    troubles = _troubles(call.engines)
    return report(503, "restarting", "; ".join(troubles)) if troubles else report(200, "ready")


async def load(call: Call) -> Response:
    """How many prompts wait or run."""
    return as_json({"server_load": call.engines.load})


async def version(call: Call) -> Response:
    """The version of Poolhouse."""
    return as_json({"version": __version__})


async def metrics(call: Call) -> Response:
    """Counters and histograms in Prometheus' text format."""
    # Some milliseconds of work: requests need not wait for it.
    text = await asyncio.to_thread(call.engines.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def models(call: Call) -> Response:
    """The served models, with the tasks and the limit of each."""
    return as_json(await listed(call.engines))


async def model(call: Call) -> Response:
    """One of the served models, by any of its names."""
    return as_json(await found(call.engines, call.path_params["model"]))


async def listed(engines: Engines) -> dict[str, object]:
    """The served models and adapters, as OpenAI lists them."""
    return {"object": "list", "data": [about(engines, one) for one in await engines.refreshed()]}


async def found(engines: Engines, name: str) -> dict[str, object]:
    """The model of that name; all of them where a path ends before it.

    Raises:
        UnknownModel: there is none; its message names those there are.
    """
    return await listed(engines) if name == "" else about(engines, await named(engines, name))


async def named(engines: Engines, name: str) -> Listed:
    """What lists show of a name in a path.

    Raises:
        UnknownModel: there is none; its message names those there are.
    """
    try:
        return engines.described(await engines.find(name))
    except UnknownModel as error:
        raise UnknownModel(str(error), "model", name) from None


def about(engines: Engines, one: Listed) -> dict[str, object]:
    """The description of a served model, under any of its names. What it can do is known once it was loaded."""
    facts, settings = one.facts, engines.settings
    return {
        "id": one.name,
        "object": "model",
        "created": int(one.since),
        "owned_by": "poolhouse",
        "root": one.model,
        "parent": None if facts is None else facts.parent,
        "max_model_len": None if facts is None else facts.max_tokens,
        "model_type": None if facts is None else _model_type(facts),
        "tasks": [] if facts is None else list(facts.tasks),
        "modalities": ["text", "image"] if facts is not None and facts.pictures else ["text"],
        "prompts": [] if facts is None else sorted(facts.prompts),
        "labels": [] if facts is None else [facts.label_names[index] for index in sorted(facts.label_names)],
        "takes_labels": facts is not None and takes_labels(facts),
        "sparse": None if facts is None or facts.sparse is None else facts.sparse.unit,
        "state": one.state,
        "reason": one.reason,
        "weight_bytes": one.weight_bytes,
        "memory_bytes": one.memory_bytes,
        "last_used": one.last_used,
        "expires": one.expires,
        "limits": {
            "max_client_batch_size": settings.max_client_batch_size,
            "max_queued_prompts": settings.max_queued_prompts,
            "max_body_bytes": settings.max_body_bytes,
            "request_timeout_seconds": settings.request_timeout_seconds,
        },
        "permission": [],
    }


def answer(engines: Engines) -> Response:
    """An empty 200 while every engine can answer, else an empty 503."""
    return Response(status_code=200 if engines.alive and not _troubles(engines) else 503)


def _model_type(facts: EngineFacts) -> str:
    """Xinference's type of a model, by which its clients choose the route."""
    if "classify" in facts.tasks and facts.labels == 1:
        return "rerank"
    return "embedding" if {"embed", "token_embed"} & set(facts.tasks) else "classifier"


def _troubles(engines: Engines) -> list[str]:
    """Of models that run in replicas of which none is up: why."""
    replicated = [served.engine for served in engines.always if isinstance(served.engine, Replicated)]
    return [trouble for engine in replicated if (trouble := engine.trouble) is not None]


class Probe(TypedDict):
    """The state of the server, for a supervisor. reason: why no replica of a model is up."""

    status: Literal["live", "ready", "loading", "failed", "restarting"]
    reason: NotRequired[str]


class Load(TypedDict):
    """Prompts that wait or run."""

    server_load: int


class Version(TypedDict):
    """The version of Poolhouse."""

    version: str


class Limits(TypedDict):
    """The limits of one request."""

    max_client_batch_size: int
    max_queued_prompts: int
    max_body_bytes: int
    request_timeout_seconds: float


class Model(TypedDict):
    """A served model, or an adapter of one; null, or empty, is what is not known before it was loaded.

    `weight_bytes`: of its files, or of its weights in memory. `memory_bytes`: what counts for --memory-limit. `last_used`,
    `expires`: seconds since 1970. `reason`: why it failed. `takes_labels`: whether requests may bring labels.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    model_type: Literal["embedding", "rerank", "classifier"] | None
    tasks: list[Task]
    modalities: list[Literal["text", "image"]]
    prompts: list[str]
    labels: list[str]
    takes_labels: bool
    sparse: Literal["token", "vocabulary", "feature"] | None
    state: State
    reason: str | None
    weight_bytes: int
    memory_bytes: int
    last_used: float | None
    expires: float | None
    limits: Limits
    permission: list[object]


class Models(TypedDict):
    """The served models."""

    object: Literal["list"]
    data: list[Model]


DIALECT = Dialect(
    "server",
    (
        Route("GET", "/health", health, errors=(Errors(None, (503,)),)),
        Route("GET", "/ping", health, hidden=True),
        Route("POST", "/ping", health, hidden=True),
        Route("GET", "/health/live", live, replies=(Probe,), others=("/v1/health/live",)),
        Route(
            "GET",
            "/health/ready",
            ready,
            replies=(Probe,),
            errors=(Errors(Probe, (503,)),),
            others=("/v1/health/ready",),
        ),
        Route("GET", "/load", load, replies=(Load,)),
        Route("GET", "/version", version, replies=(Version,)),
        Route("GET", "/metrics", metrics, media=("text/plain",)),
        Route("GET", "/v1/models", models, replies=(Models,)),
        Route("GET", "/v1/models/{model:path}", model, replies=(Model,), errors=(Errors(statuses=(404,)),)),
    ),
)
