"""Outputs: what the methods of LLM return.

Vectors stay numpy arrays until a caller wants tensors or lists, so nothing is copied through Python floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from poolhouse.errors import InvalidRequest
from poolhouse.packing.tokens import Ids

if TYPE_CHECKING:
    import torch


Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PoolingOutput:
    """The answer of `LLM.encode`.

    array: [features] for embed and classify, [tokens, features] for token tasks, [tokens] for weights of tokens.
    """

    array: Array

    @cached_property
    def data(self) -> torch.Tensor:
        """The same numbers as a tensor with the same memory."""
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

    array: [labels], probabilities, or logits where requested. label: the name of the largest; None where it has none.
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
    """A part of a text and its label.

    label: one of the request's, or of the model's without its B- or I-, except for single tokens (strategy "none").
    score: how likely it is; of labelled tokens the mean probability of the parts.
    start, end: its first character, and the one after its last. text: the part itself.
    """

    label: str
    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True, eq=False)
class TokenClassificationOutput(PoolingOutput):
    """The answer of `LLM.token_classify`.

    array: [tokens, labels]. entities: of the text, in order.
    """

    entities: tuple[Entity, ...] = ()


@dataclass(frozen=True, eq=False)
class ExtractionOutput:
    """The answer of `LLM.extract`: what was found in the text, in order of its first characters."""

    entities: tuple[Entity, ...]


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


@dataclass(frozen=True, eq=False)
class SparseVector:
    """Weights of the few entries that a text has; the answer of `LLM.embed_sparse`.

    ids: token ids (or numbers of features) in rising order. weights: [entries]; none is 0.
    names: the vocabulary entries of ids; None where ids are not tokens.
    """

    ids: Ids
    weights: Array
    names: Callable[[Sequence[int]], list[str]] | None = field(default=None, repr=False)

    @cached_property
    def indices(self) -> list[int]:
        return self.ids.tolist()  # type: ignore[no-any-return]

    @cached_property
    def values(self) -> list[float]:
        return self.weights.tolist()  # type: ignore[no-any-return]

    @cached_property
    def tokens(self) -> list[str]:
        """The vocabulary entries of ids; "" for an id that the tokenizer does not have.

        Raises:
            InvalidRequest: the ids are features, which have no names.
        """
        if self.names is None:
            raise InvalidRequest("The entries of this model are features without names, not tokens.", "tokens")
        return self.names(self.indices)

    def __getstate__(self) -> dict[str, object]:
        """The state for pickle: the names, without the tokenizer that they come from."""
        return {**self.__dict__, "names": None} | ({} if self.names is None else {"tokens": self.tokens})

    def as_dict(self) -> dict[int, float]:
        """{id: weight}, for Milvus."""
        return dict(zip(self.indices, self.values, strict=True))

    def as_tokens(self) -> dict[str, float]:
        """{token: weight}, for rank features of OpenSearch and Elasticsearch; entries without a name are left out."""
        return {token: weight for token, weight in zip(self.tokens, self.values, strict=True) if token}

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"SparseVector(entries={len(self)})"


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """Sparse vectors of many texts in compressed rows (CSR), by `LLM.embed_sparse_array`.

    indptr: [texts + 1]; text n has the entries indptr[n] to indptr[n + 1]. indices: [entries], rising within a text.
    values: [entries]. shape: (texts, vocabulary). scipy.sparse.csr_matrix((values, indices, indptr), shape) shares them.
    """

    indptr: Ids
    indices: npt.NDArray[np.int32]
    values: Array
    shape: tuple[int, int]

    @classmethod
    def of(cls, vectors: Iterable[SparseVector], width: int) -> SparseMatrix:
        """The rows of these vectors, in order. width: of the vocabulary."""
        kept = [(vector.ids.astype(np.int32), vector.weights) for vector in vectors]
        indptr = np.zeros(len(kept) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids, _ in kept], out=indptr[1:])
        indices = np.concatenate([ids for ids, _ in kept] or [np.zeros(0, dtype=np.int32)])
        values = np.concatenate([weights for _, weights in kept] or [np.zeros(0, dtype=np.float32)])
        return cls(indptr, indices, values, (len(kept), width))

    def __repr__(self) -> str:
        return f"SparseMatrix(shape={self.shape}, entries={len(self.values)})"


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a document, by `LLM.score(prune=...)`.

    start, end: its first character, and the one after its last. probability: to keep it, the mean of its tokens'.
    """

    start: int
    end: int
    probability: float
    kept: bool


@dataclass(frozen=True)
class ScoringOutput:
    """The answer of `LLM.score`: how well two texts fit, the larger the better.

    pruned, sentences, compression: what is left of the document, its sentences, and the share of its characters that is
    gone; None unless the call prunes.
    """

    score: float
    pruned: str | None = field(default=None, repr=False)
    sentences: tuple[Sentence, ...] | None = field(default=None, repr=False)
    compression: float | None = field(default=None, repr=False)


OutputT = TypeVar("OutputT")


@dataclass(frozen=True, eq=False)
class RequestOutput(Generic[OutputT]):
    """The answer to one prompt, and how the prompt was read.

    truncated, original_tokens: whether the prompt was cut, and how many tokens it had before.
    original_tokens is an estimate by characters when original_is_estimate is set (prompts far over the limit).
    chunks: into how many pieces a prompt over the limit was split (overflow="chunk").
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


@dataclass(frozen=True, slots=True)
class LateChunk:
    """A part of a text. token_range, char_range: the first and the one after the last; None for a part without text."""

    token_range: tuple[int, int]
    char_range: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class LateChunkingMetadata:
    """The part of a text that each row of an answer is of, where `late_chunking_params` requests chunks.

    input_tokens: of the whole text, special ones included.
    """

    chunk_size: int
    input_tokens: int
    chunks: list[LateChunk]
    strategy: str = "fixed_tokens"


@dataclass(frozen=True, eq=False, repr=False)
class PoolingRequestOutput(RequestOutput[PoolingOutput]):
    """A prompt's answer from `LLM.encode`. late_chunking: the parts that its rows are of, where chunks were requested."""

    late_chunking: LateChunkingMetadata | None = None


class EmbeddingRequestOutput(RequestOutput[EmbeddingOutput]):
    """A prompt's answer from `LLM.embed`."""


class ClassificationRequestOutput(RequestOutput[ClassificationOutput]):
    """A prompt's answer from `LLM.classify`."""


class TokenClassificationRequestOutput(RequestOutput[TokenClassificationOutput]):
    """A prompt's answer from `LLM.token_classify`."""


class ExtractionRequestOutput(RequestOutput[ExtractionOutput]):
    """A text's answer from `LLM.extract`; `chunks` counts the windows in which it was read."""


class ChunkedEmbeddingRequestOutput(RequestOutput[list[EmbeddedChunk]]):
    """A text's chunks, in order, from `LLM.embed_chunks`; `chunks` counts the windows in which it was read."""


class SparseRequestOutput(RequestOutput[SparseVector]):
    """A prompt's sparse vector from `LLM.embed_sparse`."""


class ScoringRequestOutput(RequestOutput[ScoringOutput]):
    """A pair's answer from `LLM.score`."""
