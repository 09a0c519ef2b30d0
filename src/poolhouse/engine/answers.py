"""Answers as the outputs that plugins and callers of Python get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from poolhouse.engine.request import Answer
from poolhouse.outputs import PoolingOutput, PoolingRequestOutput
from poolhouse.tokens import Tokens


def pooling_outputs(answers: Sequence[Answer]) -> list[PoolingRequestOutput]:
    """The answers of any task, numbered in order."""
    return [pooling(str(index), answer) for index, answer in enumerate(answers)]


def pooling(request_id: str, answer: Answer) -> PoolingRequestOutput:
    return PoolingRequestOutput(request_id, PoolingOutput(answer.array), **facts(answer))


def facts(answer: Answer) -> dict[str, Any]:
    """What every output says about its prompt."""
    return facts_of(answer.tokens, answer.chunks)


def facts_of(tokens: Tokens, chunks: int) -> dict[str, Any]:
    """What an output says about these tokens, read in so many pieces."""
    return {
        "prompt_token_ids": tokens.ids.tolist(),
        "truncated": tokens.truncated,
        "original_tokens": tokens.original_tokens,
        "original_is_estimate": tokens.original_is_estimate,
        "chunks": chunks,
    }
