"""What /v1/embeddings and /pooling share: prompts in, arrays out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from fastapi import Request, Response

from poolhouse.engine.request import Answer
from poolhouse.server import encoding
from poolhouse.server.dialects.fields import Fields
from poolhouse.server.serving import Engine, Serving, reply_id
from poolhouse.tasks import Task

# Replies of more numbers than this are written in a thread, so that the event loop goes on.
_LARGE = 50_000


async def reply(
    serving: Serving, http: Request, fields: Fields, engine: Engine, task: Task, *, prefix: str, kind: str, key: str
) -> Response:
    """Answers of `task` as a list of objects of this kind, their arrays under `key`."""
    started = time.perf_counter()
    requests = fields.requests(task)
    serving.metrics.parse_seconds.observe(time.perf_counter() - started)
    answers = await serving.answers(http, engine, requests)
    if task == "token_classify" and engine.token_weights:
        # A number per token, as vLLM writes them, not a row of one number.
        answers = [replace(answer, array=answer.array[:, 0]) for answer in answers]
    serving.metrics.count(engine.name, task, answers)

    started = time.perf_counter()
    head = {
        "id": reply_id(prefix, http, fields.request_id),
        "object": "list",
        "created": int(time.time()),
        "model": engine.name,
    }
    if sum(answer.array.size for answer in answers) > _LARGE:
        body = await asyncio.to_thread(_render, head, answers, fields.encoding_format, kind, key)
    else:
        body = _render(head, answers, fields.encoding_format, kind, key)
    serving.metrics.render_seconds.observe(time.perf_counter() - started)
    return Response(body, media_type="application/json", headers=_truncation(answers))


def _render(
    head: dict[str, object], answers: Sequence[Answer], form: encoding.EncodingFormat, kind: str, key: str
) -> bytes:
    items = [
        {"index": index, "object": kind, key: encoding.vector(answer.array, form)}
        | encoding.shape(answer.array, form)
        | encoding.cut(answer)
        for index, answer in enumerate(answers)
    ]
    return encoding.render(head, items, {"usage": encoding.usage(answers)})


def _truncation(answers: Sequence[Answer]) -> dict[str, str]:
    """A header that says how many prompts were cut, when any was."""
    count = sum(answer.tokens.truncated for answer in answers)
    return {"X-Poolhouse-Truncated": str(count)} if count else {}
