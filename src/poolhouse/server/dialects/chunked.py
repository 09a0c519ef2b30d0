"""Late chunking on /v1/embeddings, as Jina's API has it: the inputs are the chunks of one text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from fastapi import Request

from poolhouse.engine.request import Answer
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import Prompt
from poolhouse.late_chunking import Chunking, plan
from poolhouse.outputs import Array
from poolhouse.server.serving import Engine, Serving

# Between the inputs, which are sentences or paragraphs of one text.
_JOINT = " "


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A text that was read as a whole.

    chunks: the vector of each, in order. whole: the text's tokens, as an answer, for counting.
    """

    chunks: list[Array]
    whole: Answer


async def read(serving: Serving, http: Request, engine: Engine, requests: Sequence[EngineRequest]) -> Read:
    """The vectors of texts that follow each other, each of which knows the texts around it.

    requests: of the task embed, alike but for their texts.

    Raises:
        InvalidRequest: token ids, or a text without a token.
    """
    texts = [request.prompt.text for request in requests if request.prompt.text]
    if len(texts) != len(requests):
        raise InvalidRequest("late_chunking takes texts that are not empty.", "input")
    ends = [end - len(_JOINT) for end in accumulate(len(text) + len(_JOINT) for text in texts)]
    spans = [(end - len(text), end) for text, end in zip(texts, ends, strict=True)]
    params = requests[0].params
    if params.truncate_prompt_tokens == -1:
        # What is longer than the model reads is read in windows; cut, the last chunks would have no token.
        params = replace(params, truncate_prompt_tokens=None)
    whole = replace(requests[0], prompt=Prompt(_JOINT.join(texts)), params=params)
    try:
        made = await asyncio.to_thread(plan, engine, [whole], Chunking(spans=[spans]))
    except InvalidRequest as error:
        raise type(error)(
            str(error), "input" if error.parameter == "chunks" else error.parameter, error.value
        ) from None
    if not made.requests:
        raise InvalidRequest("late_chunking takes texts that are more than white space.", "input")
    windows = [replace(window, adapter=whole.adapter, priority=whole.priority) for window in made.requests]
    answers = await serving.answers(http, engine, windows)
    (chunked,) = made.finish(answers)
    return Read([chunk.array for chunk in chunked.chunks], replace(answers[0], tokens=chunked.tokens))
