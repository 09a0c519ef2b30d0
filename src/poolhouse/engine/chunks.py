"""Over-long prompts in pieces: split before the model, joined after it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from poolhouse.engine.request import Answer, Request
from poolhouse.engine.scheduler import Ready
from poolhouse.errors import NoStep
from poolhouse.outputs import Array
from poolhouse.params import PoolingParams
from poolhouse.tasks import TOKEN_TASKS, Task
from poolhouse.tokens import Tokens


def pieces(request: Request, params: PoolingParams, tokens: Tokens, size: int, adapter: str | None) -> list[Ready]:
    """Pieces of an over-long prompt; the request is answered when the last one is, and fails when one does."""
    parts = [Ready(piece, request.task, params, Future(), adapter, part=True) for piece in split(tokens, size)]
    missing = len(parts)
    lock = threading.Lock()

    def one_done(_: Future[Answer]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            if missing:
                return
        if not request.future.set_running_or_notify_cancel():
            return
        try:
            arrays = [part.future.result().array for part in parts]
            array = join(arrays, [part.length for part in parts], request.task)
        except Exception as error:  # noqa: BLE001 - the piece's error is the request's error
            request.future.set_exception(error)
        else:
            request.future.set_result(Answer(array, tokens, chunks=len(parts)))

    def leave(whole: Future[Answer]) -> None:
        if whole.cancelled():
            for part in parts:
                part.future.cancel()

    for part in parts:
        part.future.add_done_callback(one_done)
    request.future.add_done_callback(leave)
    return parts


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

    Raises:
        NoStep: process rewards of a prompt without a step.
    """
    if task in TOKEN_TASKS:
        rows = np.concatenate(arrays)
        if not len(rows):
            raise NoStep
        return rows
    pieces = np.stack(arrays)
    weights = np.asarray(lengths, dtype=np.float32)
    mean: Array = (pieces * weights[:, None]).sum(axis=0) / weights.sum()
    if task == "embed" and np.allclose(np.linalg.norm(pieces, axis=1), 1.0, atol=1e-3):
        mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return mean.astype(np.float32)
