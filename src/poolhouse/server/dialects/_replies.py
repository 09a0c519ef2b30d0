"""Replies: the counts of tokens and of cut inputs that replies of several routes show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import TypedDict

from poolhouse.engine.request import Answer


class TokenCounts(TypedDict):
    """Tokens of the inputs; nothing is generated, so both are equal."""

    prompt_tokens: int
    total_tokens: int


def usage(answers: Sequence[Answer]) -> dict[str, int | None]:
    """Token counts as OpenAI and vLLM give them; `truncated` counts the prompts that were cut, if any."""
    tokens = tokens_of(answers)
    counts: dict[str, int | None] = {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    truncated = truncated_of(answers)
    return counts | {"truncated": truncated} if truncated else counts


def token_counts(answers: Sequence[Answer]) -> TokenCounts:
    """The usage that most APIs give."""
    tokens = tokens_of(answers)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def tokens_of(answers: Sequence[Answer]) -> int:
    """Tokens of all prompts."""
    return sum(len(answer.tokens) for answer in answers)


def picture_tokens_of(answers: Sequence[Answer]) -> int:
    """Tokens that stand for pictures."""
    pictures = (answer.tokens.pictures for answer in answers)
    return sum(int(np.count_nonzero(shown.filled)) for shown in pictures if shown is not None)


def truncated_of(answers: Sequence[Answer]) -> int:
    """How many prompts were cut."""
    return sum(answer.tokens.truncated for answer in answers)


def cut(answer: Answer) -> dict[str, bool | int]:
    """The fields of `contract.Cut` for a prompt that was cut or split; none for others."""
    tokens = answer.tokens
    fields: dict[str, bool | int] = {}
    if tokens.truncated:
        fields = {"truncated": True, "original_tokens": tokens.original_tokens}
        if tokens.original_is_estimate:
            fields["original_is_estimate"] = True
    return fields | {"chunks": answer.chunks} if answer.chunks > 1 else fields


def cuts(answers: Sequence[Answer], items: int) -> list[dict[str, bool | int]]:
    """`cut` for each of so many items; empty where they are not one per answer, as of late chunking."""
    return [cut(answer) for answer in answers] if len(answers) == items else [{} for _ in range(items)]


def cut_of_pair(answers: Sequence[Answer]) -> dict[str, bool | int]:
    """As `cut`, of the prompts that one score was made of: true where any was cut, with the sum of their tokens."""
    if not any(answer.tokens.truncated for answer in answers):
        return {}
    return {"truncated": True, "original_tokens": sum(answer.tokens.original_tokens for answer in answers)}
