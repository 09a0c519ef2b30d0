"""The pooling tasks, and which methods and routes each one opens."""

from __future__ import annotations

from typing import Literal, get_args

from poolhouse.errors import InvalidRequest, UnsupportedTask, did_you_mean

Task = Literal["embed", "token_embed", "classify", "token_classify"]

TASKS: tuple[Task, ...] = get_args(Task)

# Tasks whose answer has a row per token; the others answer with one row per prompt.
TOKEN_TASKS: frozenset[Task] = frozenset({"token_embed", "token_classify"})


def parse_task(word: str, supported: tuple[Task, ...]) -> Task:
    """The task that a caller means by `word`.

    Raises:
        InvalidRequest: no such task.
        UnsupportedTask: the task exists but the model lacks it; the message names what it has.
    """
    if word == "encode":
        raise InvalidRequest("`encode` task was removed; use `token_embed` or `token_classify` instead.", "task", word)
    task = next((task for task in TASKS if task == word), None)
    if task is None:
        raise InvalidRequest(f"Unknown task: '{word}'. Tasks: {list(TASKS)}.{did_you_mean(word, TASKS)}", "task", word)
    if task not in supported:
        raise UnsupportedTask(f"Unsupported task: '{task}' Supported tasks: {list(supported)}", "task", word)
    return task
