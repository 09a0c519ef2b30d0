"""Late chunking on /v1/embeddings, as Jina's API has it: the inputs are the chunks of one text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from fastapi import Request, Response

from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import Prompt
from poolhouse.late_chunking import Chunking, plan
from poolhouse.server import encoding, replies
from poolhouse.server.dialects.vectors import VectorFields
from poolhouse.server.serving import Engine, Serving

# Between the inputs, which are sentences or paragraphs of one text.
_JOINT = " "


async def answer(serving: Serving, http: Request, fields: VectorFields, engine: Engine) -> Response:
    """One vector per input, each of which knows the inputs around it.

    Raises:
        InvalidRequest: token ids, or an input without a token.
    """
    params = fields.params(dimensions=fields.dimensions)
    requests = fields.requests(serving, engine, "embed", params)
    texts = [request.prompt.text for request in requests]
    if not all(texts):
        raise InvalidRequest("late_chunking takes texts that are not empty.", "input")
    words = [text for text in texts if text]
    ends = list(accumulate(len(text) + len(_JOINT) for text in words))
    spans = [(end - len(text) - len(_JOINT), end - len(_JOINT)) for text, end in zip(words, ends, strict=True)]
    whole = replace(requests[0], prompt=Prompt(_JOINT.join(words)))
    made = await asyncio.to_thread(plan, engine, [whole], Chunking(spans=[spans]))
    windows = [replace(window, adapter=fields.adapter, priority=fields.priority) for window in made.requests]
    answers = await serving.answers(http, engine, windows)
    (chunked,) = made.finish(answers)
    head = replies.head("embd", http, fields.request_id, engine.name)
    usage = replies.usage([Answer(answers[0].array, chunked.tokens)])

    def render() -> bytes:
        items: Sequence[dict[str, Any]] = [
            {"index": index, "object": "embedding", "embedding": encoding.vector(chunk.array, fields.encoding_format)}
            for index, chunk in enumerate(chunked.chunks)
        ]
        return encoding.render(head, items, {"usage": usage})

    return await replies.write(serving, render, answers)
