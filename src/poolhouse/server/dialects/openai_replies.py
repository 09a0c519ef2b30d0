"""Replies of /v1/embeddings."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from poolhouse.server.dialects.contract import Contract, Contracts, Cut, Matrix, Vector


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


class LateChunk(TypedDict):
    """A part of a text: its first token and the one after its last, and so its characters; null where there are none."""

    token_range: tuple[int, int]
    char_range: tuple[int, int] | None


class LateChunking(TypedDict):
    """What the rows of a matrix stand for; input_tokens: of the whole text, special ones included."""

    chunk_size: int
    input_tokens: int
    chunks: list[LateChunk]
    strategy: Literal["fixed_tokens"]


class Embedding(Cut):
    """The vector of an input, or one per token or chunk: numbers, or their memory in base64, of a matrix with its shape."""

    index: int
    object: Literal["embedding"]
    embedding: Vector | Matrix | str
    shape: NotRequired[list[int]]
    late_chunking: NotRequired[LateChunking]


class EmbeddingReply(List):
    """The reply of /v1/embeddings."""

    data: list[Embedding]


BYTES = ("application/octet-stream",)
METADATA = {"metadata": "With encoding_format bytes: JSON that describes the arrays of the body."}

CONTRACTS: Contracts = {"/v1/embeddings": Contract((EmbeddingReply,), media=BYTES, headers=METADATA)}
