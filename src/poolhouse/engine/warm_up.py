"""Warm-up: prompts that touch kernels, allocator and caches before a caller has to wait for them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from poolhouse.engine.interface import PoolingEngine, WarmUpLevel
from poolhouse.engine.options import EngineOptions
from poolhouse.engine.request import Request
from poolhouse.inputs.prompts import Prompt

_TEXT = "How warm is the water of the pool?"
_SHORTEST_TOKENS = 8


def rounds(engine: PoolingEngine, options: EngineOptions, level: WarmUpLevel) -> Iterator[list[Request]]:
    """Requests to run one list after the other.

    fast: a short text for each task. full: then, for every length up to the longest prompt or a whole batch, each twice
    the last, one prompt alone and as many as fill a batch of each worker.
    """
    if level == "none":
        return
    # Queries may be looked up instead of run.
    texts = [Request(Prompt(_TEXT), task, input_type="document") for task in engine.facts.tasks]
    (tokens,) = engine.tokenize(texts[:1])
    facts, budget, workers = engine.facts, options.max_batch_tokens, options.workers
    longest = min(facts.max_tokens, options.max_prompt_tokens or facts.max_tokens, budget)
    if len(tokens) <= longest:
        yield texts
    if level == "full":
        for length in _lengths(longest):
            prompt = Prompt(None, np.resize(tokens.ids, length))
            yield [Request(prompt, facts.tasks[0], input_type="document")]
            yield [Request(prompt, facts.tasks[0], input_type="document") for _ in range(workers * (budget // length))]


def _lengths(longest: int) -> list[int]:
    """Each twice the last, up to the longest."""
    lengths = [longest]
    while lengths[-1] // 2 >= _SHORTEST_TOKENS:
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]
