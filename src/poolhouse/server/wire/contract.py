"""Contract: the types of errors and of parts of replies, for the OpenAPI document; no request reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

# The statuses of errors that any route that reads a body may have.
STATUSES = (400, 404, 408, 413, 415, 422, 429, 500, 503, 504)

Vector = list[float]
Matrix = list[Vector]


class OurError:
    """Stands for the type of errors that --error-format chooses."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of a dialect, with these statuses. body: the type of their JSON; None is an empty body."""

    body: Any = OurError
    statuses: tuple[int, ...] = STATUSES


class Cut(TypedDict):
    """The fields of an input that was cut or split."""

    truncated: NotRequired[bool]
    original_tokens: NotRequired[int]
    original_is_estimate: NotRequired[bool]
    chunks: NotRequired[int]


class SentenceReply(TypedDict):
    """A sentence of a document, in characters, and the probability to keep it."""

    start: int
    end: int
    probability: float
    kept: bool


class Pruned(TypedDict):
    """The fields of a document that was pruned: what is left, and the share of its characters that is gone."""

    pruned_text: NotRequired[str]
    compression: NotRequired[float]
    sentences: NotRequired[list[SentenceReply]]


class Problem(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class FlatError(Problem):
    """An error in vLLM's shape."""

    object: Literal["error"]


class NestedError(TypedDict):
    """An error in OpenAI's shape."""

    error: Problem


class BothError(FlatError):
    """An error in both shapes."""

    error: Problem


class Refusal(TypedDict):
    """A request that is turned away before it is read."""

    error: str
