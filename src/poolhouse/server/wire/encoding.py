"""Encoding of answers: numpy arrays as JSON, base64 or bytes, without Python floats in between."""

from __future__ import annotations

import base64
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from poolhouse.errors import InvalidRequest
from poolhouse.outputs import Array
from poolhouse.tasks import Task
from poolhouse.vectors.precision import QUANTIZED, Calibration, Precision, quantize

EncodingFormat = Literal["float", "base64", "bytes", "bytes_only"]
Endianness = Literal["native", "little", "big"]
Numbers = npt.NDArray[Any]

# Items in one call of the writer; between two calls the interpreter may switch threads.
_ITEMS_AT_ONCE = 16
# Python's http.client refuses header lines over 64 KiB, httpx headers over 100 KiB in all.
_MAX_HEADER_BYTES = 60_000
# More items need not be tried: each takes at least 75 bytes.
_MAX_ITEMS = _MAX_HEADER_BYTES // 75


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the arrays of a reply are written.

    precision, endianness: of base64 and bytes. In JSON numbers, whole-number precisions hold as well, and the others
    stay float32, as vLLM has it. calibration: the ranges of int8 and uint8.
    """

    form: EncodingFormat = "float"
    precision: Precision = "float32"
    endianness: Endianness = "native"
    calibration: Calibration | None = None

    @classmethod
    def of(
        cls,
        form: EncodingFormat,
        precision: Precision,
        endianness: Endianness,
        task: Task,
        tasks: Sequence[Task],
        calibration: Calibration | None,
    ) -> Encoding:
        """The encoding of this task's answers, of a model with these tasks and this calibration.

        Raises:
            InvalidRequest: a precision for vectors, and a task that answers with something else.
        """
        if precision in QUANTIZED and task not in ("embed", "token_embed"):
            raise InvalidRequest(
                f"embed_dtype {precision!r} is for vectors (tasks embed and token_embed), not for {task}.",
                "embed_dtype",
                precision,
            )
        # Ranges are those of one task's vectors: of embed, where the model has it.
        calibrated = task == "embed" or "embed" not in tasks
        return cls(form, precision, endianness, calibration if calibrated else None)

    @property
    def in_json(self) -> bool:
        """Whether the arrays stand in a JSON body, else the body is nothing but them."""
        return self.form in ("float", "base64")


def encode(arrays: Sequence[Array], encoding: Encoding, field: str = "embed_dtype") -> list[Numbers]:
    """The arrays in the precision and byte order of the encoding, C-contiguous, in their order.

    They are converted together: rows of equal width as one matrix, other arrays number by number.
    field: what asked for the precision, for messages.

    Raises:
        InvalidRequest: a width that the precision cannot take.
    """
    precision: Precision = encoding.precision
    if encoding.form == "float" and precision not in QUANTIZED:
        precision = "float32"
    if precision == "float32" or not arrays:
        return [_swapped(np.ascontiguousarray(array), encoding) for array in arrays]
    widths = {array.shape[-1] for array in arrays}
    width = widths.pop() if len(widths) == 1 else 1
    rows = np.concatenate([array.reshape(-1, width) for array in arrays])
    codes = _swapped(quantize(rows, precision, encoding.calibration, field=field), encoding)
    if width == 1:
        shapes = [array.shape for array in arrays]
    else:
        shapes = [(*array.shape[:-1], codes.shape[1]) for array in arrays]
    bounds = itertools.pairwise(itertools.accumulate((array.size // width for array in arrays), initial=0))
    return [codes[start:end].reshape(shape) for (start, end), shape in zip(bounds, shapes, strict=True)]


def render(head: Mapping[str, object], items: Sequence[Mapping[str, object]], tail: Mapping[str, object]) -> bytes:
    """`{**head, "data": [items], **tail}` as JSON; numpy arrays become numbers straight from their memory."""
    pieces = [
        orjson.dumps(items[start : start + _ITEMS_AT_ONCE], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        for start in range(0, len(items), _ITEMS_AT_ONCE)
    ]
    return b'%s,"data":[%s],%s' % (orjson.dumps(head)[:-1], b",".join(pieces), orjson.dumps(tail)[1:])


def vector(array: Array, form: EncodingFormat) -> Numbers | str:
    """The array as it goes into JSON: numbers, or little-endian float32 in base64."""
    return value(encode([array], Encoding(form, endianness="little"))[0], form)


def value(array: Numbers, form: EncodingFormat) -> Numbers | str:
    """An encoded array as it goes into JSON: numbers, or its memory in base64."""
    return array if form == "float" else base64.b64encode(array.data).decode("ascii")


def shape(array: Numbers, form: EncodingFormat) -> dict[str, list[int]]:
    """The shape of a matrix in base64, which the text alone would lose."""
    return {"shape": list(array.shape)} if form == "base64" and array.ndim > 1 else {}


def dumps(value: object) -> bytes:
    """JSON, with numpy arrays as numbers straight from their memory."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def octets(
    arrays: Sequence[Numbers], head: Mapping[str, object], tokens: int, encoding: Encoding
) -> tuple[bytes, dict[str, str]]:
    """Encoded arrays end to end as a body, and its headers.

    `bytes` describes each in the header `metadata`, as vLLM does: JSON of id, created, model, data (index, embed_dtype,
    endianness, start, end, shape) and usage. Where that is too long for common clients, `data` is left out, and `count`,
    `embed_dtype`, `endianness` and `shape` describe all of them; `rows` gives the first length of each where they differ.

    Raises:
        InvalidRequest: more arrays of different lengths than a header can describe.
    """
    body = b"".join([array.data for array in arrays])
    if encoding.form == "bytes_only":
        return body, {}
    about = {name: head[name] for name in ("id", "created", "model")}
    usage = {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    for data in (_each, _together) if len(arrays) <= _MAX_ITEMS else (_together,):
        metadata = json.dumps(about | data(arrays, encoding) | usage, separators=(",", ":"))
        if len(metadata) <= _MAX_HEADER_BYTES:
            return body, {"metadata": metadata}
    raise InvalidRequest(
        f"A header cannot describe {len(arrays)} arrays of different lengths; send fewer inputs, or ask for "
        "encoding_format 'base64', which gives the shape beside each.",
        "encoding_format",
        encoding.form,
    )


def _swapped(array: Numbers, encoding: Encoding) -> Numbers:
    """The array in the byte order of the encoding; numbers of JSON have none."""
    if encoding.form == "float" or encoding.endianness in ("native", sys.byteorder):
        return array
    return array.byteswap()


def _each(arrays: Sequence[Numbers], encoding: Encoding) -> dict[str, object]:
    ends = list(itertools.accumulate(array.nbytes for array in arrays))
    return {
        "data": [
            {
                "index": index,
                "embed_dtype": encoding.precision,
                "endianness": encoding.endianness,
                "start": end - array.nbytes,
                "end": end,
                "shape": array.shape,
            }
            for index, (array, end) in enumerate(zip(arrays, ends, strict=True))
        ]
    }


def _together(arrays: Sequence[Numbers], encoding: Encoding) -> dict[str, object]:
    first = arrays[0].shape
    about = {"count": len(arrays), "embed_dtype": encoding.precision, "endianness": encoding.endianness}
    if all(array.shape == first for array in arrays):
        return about | {"shape": first}
    return about | {"shape": (None, *first[1:]), "rows": [len(array) for array in arrays]}
