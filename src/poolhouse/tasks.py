"""The pooling tasks, and which methods and routes each one opens."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

from poolhouse.errors import InvalidRequest, UnsupportedTask, did_you_mean

Task = Literal["embed", "token_embed", "classify", "token_classify", "plugin"]

TASKS: tuple[Task, ...] = get_args(Task)

# Tasks whose answer has a row per token; the others answer with one row per prompt.
TOKEN_TASKS: frozenset[Task] = frozenset({"token_embed", "token_classify"})


@dataclass(frozen=True, slots=True)
class SparseHead:
    """How a sparse vector is read off the answer of a task.

    unit: what is weighed: "token", a row weighs the token behind it (BGE-M3); "vocabulary", a feature is a vocabulary
    entry (SPLADE); "feature", features have no names (sparse autoencoders).
    width: how many ids there are.
    ends: ids without a row where a prompt begins with the first and ends with the second.
    left_out: ids that never get an entry: special tokens.
    """

    task: Task
    unit: Literal["token", "vocabulary", "feature"]
    width: int
    ends: tuple[int, int] | None = None
    left_out: frozenset[int] = frozenset()


def parse_task(word: str, supported: tuple[Task, ...], beside: tuple[str, ...] = ()) -> Task:
    """The task that a caller means by `word`; vLLM's former words `score` and `encode` warn.

    beside: further words that the caller may say in its place, for the message.

    Raises:
        InvalidRequest: no such task.
        UnsupportedTask: the task exists but the model lacks it; the message names what it has.
    """
    word = _today(word, supported)
    task = next((task for task in TASKS if task == word), None)
    if task is None:
        known = [*TASKS, *beside]
        raise InvalidRequest(f"Unknown task: '{word}'. Tasks: {known}.{did_you_mean(word, known)}", "task", word)
    if task not in supported:
        if task == "plugin":
            raise UnsupportedTask(
                "No IOProcessor plugin installed. Install one and name it by io_processor_plugin; see docs/offline.md.",
                "task",
                word,
            )
        raise UnsupportedTask(f"Unsupported task: '{task}' Supported tasks: {list(supported)}", "task", word)
    return task


def _today(word: str, supported: tuple[Task, ...]) -> str:
    """What a former word means: `score` classifies a pair, `encode` gives a row per token."""
    if word == "score":
        meant: Task = "classify"
    elif word == "encode":
        meant = "token_classify" if "token_embed" not in supported and "token_classify" in supported else "token_embed"
    else:
        return word
    warnings.warn(f"The task `{word}` was removed; use `{meant}` instead.", DeprecationWarning, stacklevel=5)
    return meant
