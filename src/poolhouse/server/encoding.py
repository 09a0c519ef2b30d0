"""Answers as bytes, without Python floats in between."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson

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


def dumps(value: Any) -> bytes:
    """JSON, with numpy arrays as numbers straight from their memory."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
