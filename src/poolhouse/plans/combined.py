"""Combined scores: a model's dense, sparse and multi-vector answers, each compared, and their weighted mean.

Source: FlagEmbedding's `BGEM3FlagModel.compute_score`, for models that give all three from one pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest, UnsupportedTask, did_you_mean
from poolhouse.outputs import Array, SparseVector
from poolhouse.plans import sparse
from poolhouse.tasks import Task
from poolhouse.vectors.max_sim import max_sim

Part = Literal["dense", "sparse", "colbert"]

# The order of weights.
PARTS: tuple[Part, ...] = ("dense", "sparse", "colbert")
# What each mode of a score compares.
MODES: Mapping[str, tuple[Part, ...]] = {
    "dense": ("dense",),
    "sparse": ("sparse",),
    "colbert": ("colbert",),
    "sparse+dense": ("dense", "sparse"),
    "colbert+sparse+dense": PARTS,
    "weighted": PARTS,
}


@dataclass(frozen=True, slots=True, eq=False)
class ComparedText:
    """What is compared of one text; the parts that a mode leaves out are None."""

    dense: Array | None = None
    sparse: SparseVector | None = None
    colbert: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Combination:
    """What a mode compares, and how.

    tasks: those to run for each text. weights: of each part, summing to 1.
    """

    engine: PoolingEngine
    tasks: tuple[Task, ...]
    weights: Mapping[Part, float]

    def compared(self, answer: Answer) -> ComparedText:
        """What is compared of a text, read once however many pairs it is in."""
        arrays = {self.tasks[0]: answer.array, **answer.further}
        head = self.engine.facts.sparse
        return ComparedText(
            _unit(arrays["embed"]) if "dense" in self.weights else None,
            sparse.vector_of(self.engine, head, arrays[head.task], answer.tokens)
            if head is not None and "sparse" in self.weights
            else None,
            arrays["token_embed"] if "colbert" in self.weights else None,
        )

    def score(self, query: ComparedText, document: ComparedText) -> float:
        """The weighted mean of the parts' scores."""
        total = 0.0
        if query.dense is not None and document.dense is not None:
            total += self.weights["dense"] * float(query.dense @ document.dense)
        if query.sparse is not None and document.sparse is not None:
            total += self.weights["sparse"] * sparse.dot(query.sparse, document.sparse)
        if query.colbert is not None and document.colbert is not None:
            total += self.weights["colbert"] * mean_max_sim(query.colbert, document.colbert)
        return total


def combination(engine: PoolingEngine, mode: str, weights: Sequence[float] | None) -> Combination:
    """How texts are compared in this mode of a score.

    weights: of the dense, sparse and colbert scores; a part of weight 0 is not computed.

    Raises:
        InvalidRequest: no such mode, or weights that do not fit it. UnsupportedTask: a model that lacks a part.
    """
    if mode not in MODES:
        raise InvalidRequest(
            f"Unknown mode '{mode}'.{did_you_mean(str(mode), MODES)} Modes of a score: {list(MODES)}.", "mode", mode
        )
    shares = _shares(mode, weights)
    tasks = _tasks(engine)
    missing = [part for part in shares if part not in tasks]
    if missing:
        possible = [name for name, parts in MODES.items() if set(parts) <= set(tasks)]
        raise UnsupportedTask(
            f"mode='{mode}' compares {' and '.join(missing)} answers, which this model does not give. "
            f"Modes that it has: {possible or 'none'}.",
            "mode",
            mode,
        )
    return Combination(engine, tuple(dict.fromkeys(tasks[part] for part in shares)), shares)


def mean_max_sim(query: Array, document: Array) -> float:
    """MaxSim divided by the number of query vectors; [tokens, features] each."""
    return float(max_sim(query, [document])[0]) / max(len(query), 1)


def _tasks(engine: PoolingEngine) -> dict[Part, Task]:
    """The task that gives each part that the model has."""
    head = engine.facts.sparse
    tasks: dict[Part, Task] = {}
    if "embed" in engine.facts.tasks:
        tasks["dense"] = "embed"
    if head is not None:
        tasks["sparse"] = head.task
    # Vectors as wide as a vocabulary are no multi-vector answer.
    if "token_embed" in engine.facts.tasks and (head is None or head.unit == "token"):
        tasks["colbert"] = "token_embed"
    return tasks


def _shares(mode: str, weights: Sequence[float] | None) -> dict[Part, float]:
    """The share of each part that counts in this mode."""
    parts = MODES[mode]
    if weights is None:
        return dict.fromkeys(parts, 1 / len(parts))
    if len(parts) == 1:
        raise InvalidRequest(f"mode='{mode}' is one score; weights are for 'weighted'.", "weights", weights)
    if len(weights) != len(PARTS):
        raise InvalidRequest(
            f"weights must be {len(PARTS)} numbers, of the dense, sparse and colbert scores, got {len(weights)}.",
            "weights",
            weights,
        )
    if not all(isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0 for weight in weights):
        raise InvalidRequest(f"weights must be numbers from 0, got {list(weights)}.", "weights", weights)
    kept = {part: float(weight) for part, weight in zip(PARTS, weights, strict=True) if part in parts and weight > 0}
    if not kept:
        raise InvalidRequest(f"weights leave nothing to compare in mode='{mode}', got {list(weights)}.", "weights")
    total = sum(kept.values())
    return {part: weight / total for part, weight in kept.items()}


def _unit(vector: Array) -> Array:
    unit: Array = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return unit
