"""Warming: prompts that touch kernels, allocator and caches before a caller has to wait for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from poolhouse.engine.options import EngineOptions
from poolhouse.engine.request import Request
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.tokens import Tokens
from poolhouse.tasks import Task

WarmUpLevel = Literal["none", "fast", "full"]

_TEXT = "How warm is the water of the pool?"
_SHORTEST_TOKENS = 8


class Engine(Protocol):
    """What warming must know of an engine."""

    @property
    def options(self) -> EngineOptions: ...

    @property
    def tasks(self) -> tuple[Task, ...]: ...

    @property
    def max_tokens(self) -> int: ...

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]: ...


def rounds(engine: Engine, level: WarmUpLevel) -> Iterator[list[Request]]:
    """Requests to run one list after the other.

    fast: a short text for each task. full: then, for every length up to the longest prompt or a whole batch, each twice
    the last, one prompt alone and as many as fill a batch of each worker.
    """
    if level == "none":
        return
    # Queries may be looked up instead of run.
    texts = [Request(Prompt(_TEXT), task, input_type="document") for task in engine.tasks]
    (tokens,) = engine.tokenize(texts[:1])
    budget, workers = engine.options.max_batch_tokens, engine.options.workers
    most = min(engine.max_tokens, engine.options.max_prompt_tokens or engine.max_tokens, budget)
    if len(tokens) <= most:
        yield texts
    if level == "full":
        for length in _lengths(most):
            prompt = Prompt(None, np.resize(tokens.ids, length))
            yield [Request(prompt, engine.tasks[0], input_type="document")]
            yield [Request(prompt, engine.tasks[0], input_type="document") for _ in range(workers * (budget // length))]


def _lengths(most: int) -> list[int]:
    """Each twice the last, and the longest there may be."""
    lengths = [most]
    while lengths[-1] // 2 >= _SHORTEST_TOKENS:
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]
