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
    """Answers of `task` as a list of objects of this kind, their arrays under `key`; or as bytes alone."""
    started = time.perf_counter()
    how = encoding.Encoding.of(
        fields.encoding_format, fields.embed_dtype, fields.endianness, task, engine.tasks, engine.calibration
    )
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
        response = await asyncio.to_thread(_render, head, answers, how, kind, key)
    else:
        response = _render(head, answers, how, kind, key)
    serving.metrics.render_seconds.observe(time.perf_counter() - started)
    return response


def _render(
    head: dict[str, object], answers: Sequence[Answer], how: encoding.Encoding, kind: str, key: str
) -> Response:
    arrays = encoding.encode([answer.array for answer in answers], how)
    usage = encoding.usage(answers)
    if not how.in_json:
        body, about = encoding.octets(arrays, head, usage["prompt_tokens"], how)
        return Response(body, media_type="application/octet-stream", headers=about | _truncation(answers))
    items = [
        {"index": index, "object": kind, key: encoding.value(array, how.form)}
        | encoding.shape(array, how.form)
        | encoding.cut(answer)
        for index, (array, answer) in enumerate(zip(arrays, answers, strict=True))
    ]
    body = encoding.render(head, items, {"usage": usage})
    return Response(body, media_type="application/json", headers=_truncation(answers))


def _truncation(answers: Sequence[Answer]) -> dict[str, str]:
    """A header that says how many prompts were cut, when any was."""
    count = sum(answer.tokens.truncated for answer in answers)
    return {"X-Poolhouse-Truncated": str(count)} if count else {}
