"""Over-long prompts in pieces: split before the model, joined after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poolhouse.outputs import Array
from poolhouse.tasks import TOKEN_TASKS, Task
from poolhouse.tokens import Tokens


def split(tokens: Tokens, size: int) -> list[Tokens]:
    """Slices of at most `size` tokens; special tokens stand at the very ends only, as in vLLM."""
    return [
        Tokens(
            ids=tokens.ids[start : start + size],
            types=None if tokens.types is None else tokens.types[start : start + size],
            original_tokens=min(size, len(tokens) - start),
            skip=max(0, min(tokens.skip - start, size)),
        )
        for start in range(0, len(tokens), size)
    ]


def join(arrays: Sequence[Array], lengths: Sequence[int], task: Task) -> Array:
    """One answer from the pieces' answers.

    Token tasks: all rows. Others: the mean weighted by tokens, brought back to unit length when all pieces had it.
    """
    if task in TOKEN_TASKS:
        return np.concatenate(arrays)
    pieces = np.stack(arrays)
    weights = np.asarray(lengths, dtype=np.float32)
    mean: Array = (pieces * weights[:, None]).sum(axis=0) / weights.sum()
    if np.allclose(np.linalg.norm(pieces, axis=1), 1.0, atol=1e-3):
        mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return mean.astype(np.float32)
