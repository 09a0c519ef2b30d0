"""Channel: messages between two processes over a socket; arrays travel as raw bytes, many requests or answers as columns.

A frame, whose parts begin at multiples of 64 bytes so that arrays in it are aligned:

    parts (8 bytes)   bytes that follow (8)   | sizes of the parts (8 each) | pickle | array | array ...

A `Request` or an `Answer` is made of a dozen small objects, and pickling each of them takes longer than a short text takes
a GPU. So requests are rows of plain values, which pickle writes without calling Python, and the arrays of many answers are
laid end to end.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from poolhouse.engine.request import Answer, Request, Timing
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.tokens import Ids, Tokens

_ALIGNMENT = 64
_HEADER = struct.Struct("<QQ")
# The kernel takes no more parts in one call (IOV_MAX is 1024).
_PARTS_PER_CALL = 512
_PADDING = bytes(_ALIGNMENT)

Array = npt.NDArray[Any]


class Channel:
    """One end of a socket. One thread sends and one receives at a time."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, message: object) -> None:
        """Send whatever pickle takes.

        Raises:
            OSError: the other end is gone. What pickle raises: nothing was sent.
        """
        arrays: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(message, 5, buffer_callback=arrays.append)
        parts = [memoryview(pickled), *(array.raw() for array in arrays)]
        sizes = struct.pack(f"<{len(parts)}Q", *map(len, parts))
        padded = [part for whole in (memoryview(sizes), *parts) for part in (whole, _padding(len(whole))) if len(part)]
        self._send(memoryview(_HEADER.pack(len(parts), sum(map(len, padded)))), padded)

    def _send(self, header: memoryview, parts: list[memoryview]) -> None:
        waiting = [header, *parts]
        while waiting:
            sent = self.socket.sendmsg(waiting[:_PARTS_PER_CALL])
            done = 0
            while done < len(waiting) and sent >= len(waiting[done]):
                sent -= len(waiting[done])
                done += 1
            waiting = waiting[done:]
            if sent:
                waiting[0] = waiting[0][sent:]

    def receive(self) -> Any:
        """The next message; its arrays lie in memory of its own, and may be written.

        Raises:
            EOFError: the other end is gone. What unpickling raises.
        """
        parts, total = _HEADER.unpack(self._received(_HEADER.size))
        frame = self._received(total)
        sizes = struct.unpack_from(f"<{parts}Q", frame)
        begin, views = _aligned(8 * parts), []
        for size in sizes:
            views.append(frame[begin : begin + size])
            begin += _aligned(size)
        return pickle.loads(views[0], buffers=views[1:])  # noqa: S301 - from our own other half

    def _received(self, size: int) -> memoryview:
        # Not cleared first, as a bytearray is.
        whole = view = np.empty(size, np.uint8).data
        while view:
            try:
                count = self.socket.recv_into(view)
            except OSError as error:
                raise EOFError("The other process is gone.") from error
            if not count:
                raise EOFError("The other process is gone.")
            view = view[count:]
        return whole

    def end(self) -> None:
        """Let both sides find that this is the end, also a thread that waits here for a message."""
        with suppress(OSError):  # it is already
            self.socket.shutdown(socket.SHUT_RDWR)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padding(size: int) -> memoryview:
    return memoryview(_PADDING)[: _aligned(size) - size]


# --- Requests ---

_OF_PROMPT = attrgetter(*(field.name for field in fields(Prompt)))
_REQUEST_FIELDS = [field.name for field in fields(Request) if field.name not in ("prompt", "future")]
_OF_REQUEST = attrgetter(*_REQUEST_FIELDS)

# The fields of a prompt, and those of its request.
Row = tuple[tuple[Any, ...], tuple[Any, ...]]


def row_of(request: Request) -> Row:
    """A request without its future, as plain values."""
    return _OF_PROMPT(request.prompt), _OF_REQUEST(request)


def request_of(row: Row) -> Request:
    """The request again, with a future of its own."""
    prompt, values = row
    return Request(Prompt(*prompt), *values)


# --- Answers ---


@dataclass(frozen=True, slots=True, eq=False)
class _Ragged:
    """Arrays that differ in their first dimension alone, end to end."""

    values: Array
    lengths: list[int]

    def __reduce__(self) -> tuple[type[_Ragged], tuple[Array, list[int]]]:
        # That of dataclasses calls Python for each field.
        return _Ragged, (self.values, self.lengths)


_Column = _Ragged | list[Array] | list[Ids | None] | None


def _column(arrays: list[Any]) -> _Column:
    """Arrays in as few pieces as possible: nothing where there are none, one where they are alike."""
    first = arrays[0]
    if all(array is None for array in arrays):
        return None
    if any(array is None or array.dtype != first.dtype or array.shape[1:] != first.shape[1:] for array in arrays):
        return arrays
    if len(arrays) == 1:
        return _Ragged(np.ascontiguousarray(first), [len(first)])
    return _Ragged(np.concatenate(arrays), [len(array) for array in arrays])


def _arrays(column: _Column, count: int) -> Sequence[Any]:
    if column is None:
        return [None] * count
    if not isinstance(column, _Ragged):
        return column
    ends = np.cumsum(column.lengths).tolist()
    return [column.values[end - length : end] for end, length in zip(ends, column.lengths, strict=True)]


# All fields of tokens but the first two, which are columns.
_OF_TOKENS = attrgetter(*(field.name for field in fields(Tokens) if field.name not in ("ids", "types")))

# The columns of arrays, ids and types; of each answer its further tokens' fields, chunks, further arrays and times.
Columns = tuple[_Column, _Column, _Column, list[tuple[Any, ...]]]


def columns_of(answers: Sequence[Answer]) -> Columns:
    """Answers as few arrays, and a row of plain values for each."""
    return (
        _column([answer.array for answer in answers]),
        _column([answer.tokens.ids for answer in answers]),
        _column([answer.tokens.types for answer in answers]),
        [
            (
                _OF_TOKENS(answer.tokens),
                answer.chunks,
                dict(answer.further) if answer.further else None,
                (answer.timing.tokenize_seconds, answer.timing.queue_seconds, answer.timing.run_seconds),
            )
            for answer in answers
        ],
    )


def answers_of(columns: Columns) -> list[Answer]:
    """The answers again; their arrays share memory."""
    arrays, ids, types, rows = columns
    count = len(rows)
    timings: dict[tuple[float, float, float], Timing] = {}
    answers = []
    for array, own, kinds, (tokens, chunks, further, times) in zip(
        _arrays(arrays, count), _arrays(ids, count), _arrays(types, count), rows, strict=True
    ):
        timing = timings.get(times)
        if timing is None:
            timing = timings[times] = Timing(*times)
        answers.append(Answer(array, Tokens(own, kinds, *tokens), chunks, further or {}, timing))
    return answers


def gathered(outbox: SimpleQueue[tuple[Any, ...] | None]) -> Iterator[list[tuple[Any, ...]]]:
    """All that is there, again and again, for one message each; ends behind None."""
    last = False
    while not last:
        items = [outbox.get()]
        try:
            while True:
                items.append(outbox.get_nowait())
        except Empty:
            pass
        last = None in items
        yield [item for item in items if item is not None]
