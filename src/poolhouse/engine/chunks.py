"""Over-long prompts in pieces: split before the model, joined after it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from poolhouse.engine.ready import Ready
from poolhouse.engine.request import Answer, Request, start
from poolhouse.errors import NoStep
from poolhouse.outputs import Array
from poolhouse.tasks import TOKEN_TASKS, Task
from poolhouse.tokens import Tokens


def pieces(request: Request, whole: Ready, size: int) -> list[Ready]:
    """Pieces of an over-long prompt; the request is answered when the last one is, and fails when one does."""
    parts = [replace(whole, tokens=piece, future=Future(), part=True) for piece in split(whole.tokens, size)]
    missing = len(parts)
    lock = threading.Lock()

    def one_done(_: Future[Answer]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            if missing:
                return
        if not start(request.future):
            return
        try:
            answer = joined([part.future.result() for part in parts], parts, whole)
        except Exception as error:  # noqa: BLE001 - the piece's error is the request's error
            request.future.set_exception(error)
        else:
            request.future.set_result(answer)

    def leave(whole: Future[Answer]) -> None:
        if whole.cancelled():
            for part in parts:
                part.future.cancel()

    for part in parts:
        part.future.add_done_callback(one_done)
    request.future.add_done_callback(leave)
    return parts


def joined(answers: Sequence[Answer], parts: Sequence[Ready], whole: Ready) -> Answer:
    """The answer of a whole prompt, from those of its parts; it took as long as the part that was answered last.

    Raises:
        NoStep: process rewards of a prompt without a step.
    """
    lengths = [part.length for part in parts]
    array = join([answer.array for answer in answers], lengths, whole.task)
    further = {task: join([answer.further[task] for answer in answers], lengths, task) for task, _ in whole.further}
    # Of a text of skipped tokens alone, no row is an answer.
    if whole.tokens.kept is None and not all(map(len, (array, *further.values()))):
        raise NoStep
    last = max((answer.timing for answer in answers), key=lambda timing: timing.queue_seconds + timing.run_seconds)
    return Answer(array, whole.tokens, len(parts), further, last)


def split(tokens: Tokens, size: int) -> list[Tokens]:
    """Slices of at most `size` tokens; special tokens stand at the very ends only, as in vLLM."""
    return [
        Tokens(
            ids=tokens.ids[start : start + size],
            types=None if tokens.types is None else tokens.types[start : start + size],
            original_tokens=min(size, len(tokens) - start),
            skip=max(0, min(tokens.skip - start, size)),
            kept=None if tokens.kept is None else tokens.kept[start : start + size],
        )
        for start in range(0, len(tokens), size)
    ]


def join(arrays: Sequence[Array], lengths: Sequence[int], task: Task) -> Array:
    """One answer from the pieces' answers.

    Token tasks: all rows. classify: the mean of the pieces' probabilities (or logits, where asked), weighted by tokens.
    embed: the mean weighted by tokens, brought back to unit length when all pieces had it.
    """
    if task in TOKEN_TASKS:
        return np.concatenate(arrays)
    pieces = np.stack(arrays)
    weights = np.asarray(lengths, dtype=np.float32)
    mean: Array = (pieces * weights[:, None]).sum(axis=0) / weights.sum()
    if task == "embed" and np.allclose(np.linalg.norm(pieces, axis=1), 1.0, atol=1e-3):
        mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return mean.astype(np.float32)
