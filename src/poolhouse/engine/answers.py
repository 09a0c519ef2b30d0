"""Answers as the outputs that plugins and callers of Python get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from poolhouse.engine.request import Answer
from poolhouse.outputs import Array, PoolingOutput, PoolingRequestOutput
from poolhouse.tokens import Tokens


class Engine(Protocol):
    """What the shape of an answer depends on."""

    @property
    def token_weights(self) -> bool:
        """Whether `token_classify` weighs tokens for sparse retrieval."""
        ...


def shown(array: Array, task: str, engine: Engine) -> Array:
    """The array as callers see it: a number per token where `token_classify` weighs tokens, as vLLM has it."""
    return array[:, 0] if task == "token_classify" and engine.token_weights else array


def pooling_outputs(answers: Sequence[Answer], task: str, engine: Engine) -> list[PoolingRequestOutput]:
    """The answers of a task, numbered in order."""
    build = pooling(task, engine)
    return [build(str(index), answer) for index, answer in enumerate(answers)]


def pooling(task: str, engine: Engine) -> Callable[[str, Answer], PoolingRequestOutput]:
    """Answers of a task as `LLM.encode` gives them."""

    def build(request_id: str, answer: Answer) -> PoolingRequestOutput:
        return PoolingRequestOutput(request_id, PoolingOutput(shown(answer.array, task, engine)), **facts(answer))

    return build


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
