"""What callers get back.

Vectors stay numpy arrays until a caller asks for tensors or lists, so nothing is copied through Python floats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PoolingOutput:
    """The answer of `LLM.encode`.

    array: [features] for embed and classify, [tokens, features] for token tasks.
    """

    array: Array

    @cached_property
    def data(self) -> torch.Tensor:
        """The same numbers as a tensor that shares their memory."""
        import torch

        return torch.from_numpy(self.array)


@dataclass(frozen=True, eq=False)
class EmbeddingOutput:
    """The answer of `LLM.embed`; array: [dimensions]."""

    array: Array

    @cached_property
    def embedding(self) -> list[float]:
        return self.array.tolist()  # type: ignore[no-any-return]

    @property
    def hidden_size(self) -> int:
        return len(self.array)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclass(frozen=True, eq=False)
class ClassificationOutput:
    """The answer of `LLM.classify`.

    array: [labels], probabilities, or logits where asked. label: the name of the largest; None where it has none.
    """

    array: Array
    label: str | None = None

    @cached_property
    def probs(self) -> list[float]:
        return self.array.tolist()  # type: ignore[no-any-return]

    @property
    def num_classes(self) -> int:
        return len(self.array)

    def __repr__(self) -> str:
        label = "" if self.label is None else f", label={self.label!r}"
        return f"ClassificationOutput(num_classes={self.num_classes}{label})"


@dataclass(frozen=True, slots=True)
class Entity:
    """A stretch of a text and its label.

    label: without its B- or I-, except for single tokens (strategy "none"). score: the mean probability of its parts.
    start, end: its first character, and the one after its last. text: what stands there.
    """

    label: str
    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True, eq=False)
class TokenClassificationOutput(PoolingOutput):
    """The answer of `LLM.token_classify`.

    array: [tokens, labels]. entities: what its rows say about the text, in order.
    """

    entities: tuple[Entity, ...] = ()


@dataclass(frozen=True, eq=False)
class EmbeddedChunk:
    """A part of a text and its vector, by `LLM.embed_chunks`.

    array: [dimensions]. text, start, end: the part, its first character and the one after its last. tokens: how many.
    """

    array: Array
    text: str
    start: int
    end: int
    tokens: int

    @cached_property
    def embedding(self) -> list[float]:
        return self.array.tolist()  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"EmbeddedChunk(text={self.text!r}, start={self.start}, end={self.end}, tokens={self.tokens})"


@dataclass(frozen=True)
class ScoringOutput:
    """The answer of `LLM.score`: how well two texts fit, the larger the better."""

    score: float


OutputT = TypeVar("OutputT")


@dataclass(frozen=True, eq=False)
class RequestOutput(Generic[OutputT]):
    """One prompt's answer, and what was done to the prompt.

    truncated, original_tokens: whether the prompt was cut, and how many tokens it had before.
    original_tokens is an estimate by characters when original_is_estimate is set (prompts far over the limit).
    chunks: into how many pieces an over-long prompt was split (overflow="chunk").
    """

    request_id: str
    outputs: OutputT
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
    truncated: bool = False
    original_tokens: int = 0
    original_is_estimate: bool = False
    chunks: int = 1
    error: str | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        cut = f", truncated from {self.original_tokens} tokens" if self.truncated else ""
        return (
            f"{type(self).__name__}(request_id={self.request_id!r}, outputs={self.outputs!r}, "
            f"prompt_tokens={len(self.prompt_token_ids)}{cut})"
        )


class PoolingRequestOutput(RequestOutput[PoolingOutput]):
    """A prompt's answer from `LLM.encode`."""


class EmbeddingRequestOutput(RequestOutput[EmbeddingOutput]):
    """A prompt's answer from `LLM.embed`."""


class ClassificationRequestOutput(RequestOutput[ClassificationOutput]):
    """A prompt's answer from `LLM.classify`."""


class TokenClassificationRequestOutput(RequestOutput[TokenClassificationOutput]):
    """A prompt's answer from `LLM.token_classify`."""


class ChunkedEmbeddingRequestOutput(RequestOutput[list[EmbeddedChunk]]):
    """A text's chunks, in order, from `LLM.embed_chunks`; `chunks` counts the windows in which it was read."""


class ScoringRequestOutput(RequestOutput[ScoringOutput]):
    """A pair's answer from `LLM.score`."""
