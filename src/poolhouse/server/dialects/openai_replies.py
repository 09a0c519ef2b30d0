"""Replies of /v1/embeddings."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from poolhouse.server.dialects.contract import Contract, Contracts, Cut, Vector


class Usage(TypedDict):
    """Tokens of the inputs; `truncated` counts the inputs that were cut."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: None
    truncated: NotRequired[int]


class List(TypedDict):
    """What begins and ends a list of answers."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class Embedding(Cut):
    """The vector of an input: numbers, or their memory in base64."""

    index: int
    object: Literal["embedding"]
    embedding: Vector | str


class EmbeddingReply(List):
    """The reply of /v1/embeddings."""

    data: list[Embedding]


BYTES = ("application/octet-stream",)
METADATA = {"metadata": "With encoding_format bytes: JSON that describes the arrays of the body."}

CONTRACTS: Contracts = {"/v1/embeddings": Contract((EmbeddingReply,), media=BYTES, headers=METADATA)}
