"""Replies of the routes about the server."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from poolhouse.server.dialects.contract import Contract, Contracts, Errors
from poolhouse.tasks import Task


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
