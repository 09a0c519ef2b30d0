"""Tasks: the names of the pooling tasks, former names, and answers that are read as sparse vectors or as sentences kept."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

from poolhouse.errors import InvalidRequest, UnsupportedTask, did_you_mean

Task = Literal["embed", "token_embed", "classify", "token_classify", "extract", "plugin"]

TASKS: tuple[Task, ...] = get_args(Task)

# Tasks with a row per token in the answer; the others have one row per prompt.
TOKEN_TASKS: frozenset[Task] = frozenset({"token_embed", "token_classify"})


@dataclass(frozen=True, slots=True)
class SparseHead:
    """How the answer of a task becomes a sparse vector.

    unit: what has a weight: "token", each row is the weight of its token (BGE-M3); "vocabulary", each feature is a
    vocabulary entry (SPLADE); "feature", features have no names (sparse autoencoders).
    width: how many ids there are.
    ends: ids without a row, where a prompt begins with the first and ends with the second.
    left_out: ids that never get an entry: special tokens.
    """

    task: Task
    unit: Literal["token", "vocabulary", "feature"]
    width: int
    ends: tuple[int, int] | None = None
    left_out: frozenset[int] = frozenset()


PruningRule = Literal["mean", "votes"]


@dataclass(frozen=True, slots=True)
class PruningHead:
    """How the rows of `token_classify`, [drop, keep] for each token, choose sentences.

    rule: "mean", a sentence stays if the mean of its tokens' probabilities is above the threshold; "votes", if the share
    of its tokens above the threshold is above it. threshold: the model's own.
    plain_query: queries are read in lower case and without punctuation.
    parts: ids before the query, between it and the document, and behind the document.
    """

    rule: PruningRule
    threshold: float = 0.1
    plain_query: bool = False
    parts: tuple[tuple[int, ...], ...] = ()


def parse_task(name: str, supported: tuple[Task, ...], beside: tuple[str, ...] = ()) -> Task:
    """The task of that name; vLLM's former names `score` and `encode` warn.

    beside: further names that are accepted in its place, for the message.

    Raises:
        InvalidRequest: no such task.
        UnsupportedTask: the model lacks this task; the message names those it has.
    """
    name = _current_name(name, supported)
    task = next((task for task in TASKS if task == name), None)
    if task is None:
        known = [*TASKS, *beside]
        raise InvalidRequest(f"Unknown task: '{name}'. Tasks: {known}.{did_you_mean(name, known)}", "task", name)
    if task not in supported:
        if task == "plugin":
            raise UnsupportedTask(
                "No IOProcessor plugin installed. Install one and name it by io_processor_plugin; see docs/offline.md.",
                "task",
                name,
            )
        raise UnsupportedTask(f"Unsupported task: '{task}' Supported tasks: {list(supported)}", "task", name)
    return task


def _current_name(name: str, supported: tuple[Task, ...]) -> str:
    """The task of a former name: `score` classifies a pair, `encode` gives a row per token."""
    if name == "score":
        current: Task = "classify"
    elif name == "encode":
        of_labels = "token_embed" not in supported and "token_classify" in supported
        current = "token_classify" if of_labels else "token_embed"
    else:
        return name
    warnings.warn(f"The task `{name}` was removed; use `{current}` instead.", DeprecationWarning, stacklevel=5)
    return current
