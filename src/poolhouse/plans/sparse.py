"""Sparse vectors: weights of the few vocabulary entries that a text has, read from the answers of one engine.

A plan holds the requests to run, and how each answer becomes a vector. BGE-M3 gives weights of the text's own tokens,
SPLADE of any vocabulary entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import Prompt
from poolhouse.outputs import Array, SparseVector
from poolhouse.packing.tokens import Ids, Tokens
from poolhouse.params import PoolingParams
from poolhouse.tasks import SparseHead


@dataclass(frozen=True, slots=True)
class SparseOptions:
    """The options of sparse vectors, beside the texts.

    top_k: keep so many entries, the largest. threshold: leave out entries that weigh less.
    prompt_name, input_type: as in `Request`. Of `params` only those about length mean something here.
    """

    params: PoolingParams = PoolingParams()
    prompt_name: str | None = None
    input_type: str | None = None
    top_k: int | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """A text's vector. tokens: of the text; chunks: in how many pieces it was read."""

    vector: SparseVector
    tokens: Tokens
    chunks: int


@dataclass(frozen=True, slots=True, eq=False)
class SparsePlan:
    """Requests to run, and how the answer of each becomes its sparse vector; no answer needs another.

    params: of the requests.
    """

    head: SparseHead
    params: PoolingParams
    requests: list[Request]
    each: Callable[[Answer], Sparse]

    def finish(self, answers: Sequence[Answer]) -> list[Sparse]:
        """The vectors, in the order of the answers."""
        return [self.each(answer) for answer in answers]


def plan(engine: PoolingEngine, prompts: Sequence[Prompt], options: SparseOptions) -> SparsePlan:
    """What to run for the sparse vectors of these prompts, a request for each in order.

    Raises:
        UnsupportedTask: a model without such a head; the message says what it has.
        InvalidRequest: top_k, threshold or parameters that mean nothing.
    """
    head = head_of(engine)
    _check(options)
    # A token's weight is the positive part, also where the pooler config turns activations off.
    params = replace(options.params, use_activation=True) if head.unit == "token" else options.params
    requests = [
        Request(prompt, head.task, params, options.prompt_name, input_type=options.input_type) for prompt in prompts
    ]

    def each(answer: Answer) -> Sparse:
        vector = vector_of(engine, head, answer.array, answer.tokens)
        return Sparse(_pruned(vector, options), answer.tokens, answer.chunks)

    return SparsePlan(head, params, requests, each)


def head_of(engine: PoolingEngine) -> SparseHead:
    """How the engine's answers become sparse vectors.

    Raises:
        UnsupportedTask: they do not.
    """
    if engine.facts.sparse is None:
        raise UnsupportedTask(
            "This model has no sparse vectors: it is neither a SPLADE model nor has it BGE-M3's sparse_linear.pt. "
            f"Supported tasks: {list(engine.facts.tasks)}.",
            "task",
            "sparse",
        )
    return engine.facts.sparse


def vector_of(engine: PoolingEngine, head: SparseHead, array: Array, tokens: Tokens) -> SparseVector:
    """All entries of an answer of the head's task, unpruned."""
    names = None if head.unit == "feature" else engine.token_strings
    if head.unit == "token":
        return SparseVector(*_by_token(array[:, 0], tokens.ids, head, engine.facts.max_tokens), names)
    ids = np.flatnonzero(array)
    return SparseVector(ids, array[ids], names)


def dot(query: SparseVector, document: SparseVector) -> float:
    """The sum of products of the weights of entries that both have."""
    _, ours, theirs = np.intersect1d(query.ids, document.ids, assume_unique=True, return_indices=True)
    return float(query.weights[ours] @ document.weights[theirs])


def _by_token(weights: Array, ids: Ids, head: SparseHead, piece: int) -> tuple[Ids, Array]:
    """Each token id once, with its largest weight. weights: one per row. piece: tokens that are read at once."""
    ids = ids[_has_row(ids, head, piece)]
    kept = (weights > 0) & ~np.isin(ids, list(head.left_out))
    distinct, positions = np.unique(ids[kept], return_inverse=True)
    largest = np.zeros(len(distinct), dtype=np.float32)
    np.maximum.at(largest, positions, weights[kept])
    return distinct, largest


def _has_row(ids: Ids, head: SparseHead, piece: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """[tokens]: whether the answer has a row for each; of a text read in pieces, each piece has ends."""
    has_row = np.ones(len(ids), dtype=np.bool_)
    if head.ends is not None and len(ids):
        first, last = head.ends
        starts = np.arange(0, len(ids), piece)
        ends = np.minimum(starts + piece, len(ids)) - 1
        has_row[starts] &= ids[starts] != first
        has_row[ends] &= ids[ends] != last
    return has_row


def _pruned(vector: SparseVector, options: SparseOptions) -> SparseVector:
    """The vector with its largest entries only; of equal ones those of smaller ids."""
    if options.threshold is not None:
        vector = _kept(vector, np.flatnonzero(np.abs(vector.weights) >= options.threshold))
    if options.top_k is not None and len(vector) > options.top_k:
        largest = np.argsort(-np.abs(vector.weights), kind="stable")[: options.top_k]
        vector = _kept(vector, np.sort(largest))
    return vector


def _kept(vector: SparseVector, entries: Ids) -> SparseVector:
    return replace(vector, ids=vector.ids[entries], weights=vector.weights[entries])


def _check(options: SparseOptions) -> None:
    top_k, threshold = options.top_k, options.threshold
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise InvalidRequest(f"top_k must be an integer from 1, got {top_k!r}.", "top_k", top_k)
    if threshold is not None and not _is_weight(threshold):
        raise InvalidRequest(f"threshold must be a number from 0, got {threshold!r}.", "threshold", threshold)
    for name in ("dimensions", "use_activation", "step_tag_id", "returned_token_ids"):
        if getattr(options.params, name) is not None:
            raise InvalidRequest(
                f"{name} means nothing to sparse vectors; top_k and threshold make them shorter.", name
            )


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
