"""Answers as bytes, without Python floats in between."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson

from poolhouse.engine.request import Answer
from poolhouse.outputs import Array

EncodingFormat = Literal["float", "base64"]

# Items written in one go; the interpreter may switch threads between two of these.
_ITEMS_AT_ONCE = 16


def render(head: Mapping[str, Any], items: Sequence[Mapping[str, Any]], tail: Mapping[str, Any]) -> bytes:
    """`{**head, "data": [items], **tail}` as JSON; numpy arrays become numbers straight from their memory."""
    pieces = [
        orjson.dumps(items[start : start + _ITEMS_AT_ONCE], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        for start in range(0, len(items), _ITEMS_AT_ONCE)
    ]
    return b'%s,"data":[%s],%s' % (orjson.dumps(head)[:-1], b",".join(pieces), orjson.dumps(tail)[1:])


def vector(array: Array, form: EncodingFormat) -> Any:
    """The array as it goes into JSON: numbers, or little-endian float32 in base64."""
    if form == "float":
        return np.ascontiguousarray(array)
    return base64.b64encode(array.astype("<f4", copy=False).tobytes()).decode("ascii")


def shape(array: Array, form: EncodingFormat) -> dict[str, Any]:
    """The shape of a matrix in base64, which the text alone would lose."""
    return {"shape": list(array.shape)} if form == "base64" and array.ndim > 1 else {}


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


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Token counts as OpenAI and vLLM give them; `truncated` counts the prompts that were cut, if any."""
    tokens = sum(len(answer.tokens) for answer in answers)
    counts: dict[str, Any] = {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    truncated = sum(answer.tokens.truncated for answer in answers)
    if truncated:
        counts["truncated"] = truncated
    return counts
