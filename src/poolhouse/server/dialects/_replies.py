"""What replies have in common: ids, counts, what was cut, and bytes written beside the event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import Request, Response

from poolhouse.engine.request import Answer
from poolhouse.server.engines import Serving

# Replies of more numbers than this are written in a thread, so that the event loop goes on.
_LARGE = 50_000
# Texts of more characters, or lists of more ids, are tokenised and decoded in a thread.
_LONG = 200_000


def head(prefix: str, http: Request, given: str | None, model: str) -> dict[str, Any]:
    """What vLLM's and OpenAI's replies begin with: id, object, created, model."""
    return {
        "id": reply_id(prefix, http, given),
        "object": "list",
        "created": int(time.time()),
        "model": model,
    }


def reply_id(prefix: str, http: Request, given: str | None) -> str:
    """`prefix-` and the id that the header or the body gives, else 16 random hex digits."""
    return f"{prefix}-{getattr(http.state, 'given_id', None) or given or secrets.token_hex(8)}"


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


def truncation(answers: Sequence[Answer]) -> dict[str, str]:
    """A header that says how many prompts were cut, when any was."""
    count = truncated_of(answers)
    return {"X-Poolhouse-Truncated": str(count)} if count else {}


async def write(
    serving: Serving,
    render: Callable[[], bytes | Response],
    answers: Sequence[Answer],
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The reply that `render` makes of these answers: JSON, or a response of another kind."""
    started = time.perf_counter()
    large = sum(answer.array.size for answer in answers) > _LARGE
    body = await asyncio.to_thread(render) if large else render()
    serving.metrics.serialize_seconds.observe(time.perf_counter() - started)
    response = body if isinstance(body, Response) else Response(body, media_type="application/json")
    response.headers.update({**truncation(answers), **(headers or {})})
    return response


async def made(make: Callable[[], bytes], size: int | None) -> Response:
    """JSON that `make` writes without running a model.

    size: the characters, or tokens, that it goes through; None where nobody knows.
    """
    beside = size is None or size > _LONG
    return Response(await asyncio.to_thread(make) if beside else make(), media_type="application/json")
