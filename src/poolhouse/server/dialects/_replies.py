"""What replies have in common: counts of tokens, and what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from poolhouse.engine.request import Answer


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Token counts as OpenAI and vLLM give them; `truncated` counts the prompts that were cut, if any."""
    tokens = tokens_of(answers)
    counts: dict[str, Any] = {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    truncated = truncated_of(answers)
    if truncated:
        counts["truncated"] = truncated
    return counts


def tokens_of(answers: Sequence[Answer]) -> int:
    """Tokens of all prompts."""
    return sum(len(answer.tokens) for answer in answers)


def truncated_of(answers: Sequence[Answer]) -> int:
    """How many prompts were cut."""
    return sum(answer.tokens.truncated for answer in answers)


def cut(answer: Answer) -> dict[str, Any]:
    """What to say of a prompt that was not taken as it came; nothing where it was."""
    said: dict[str, Any] = {}
    tokens = answer.tokens
    if tokens.truncated:
        said = {"truncated": True, "original_tokens": tokens.original_tokens}
        if tokens.original_is_estimate:
            said["original_is_estimate"] = True
    if answer.chunks > 1:
        said["chunks"] = answer.chunks
    return said


def cuts(answers: Sequence[Answer], items: int) -> list[dict[str, Any]]:
    """`cut` for each of so many items; nothing where they are not one per answer, as of late chunking."""
    return [cut(answer) for answer in answers] if len(answers) == items else [{} for _ in range(items)]


def cut_of_pair(answers: Sequence[Answer]) -> dict[str, Any]:
    """As `cut`, of the prompts that one score was made of: true where any was cut, with the sum of their tokens."""
    if not any(answer.tokens.truncated for answer in answers):
        return {}
    return {"truncated": True, "original_tokens": sum(answer.tokens.original_tokens for answer in answers)}
