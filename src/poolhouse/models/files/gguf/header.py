"""Header: what a GGUF file says of itself, and its tensors, each made float again when it is asked for.

Source of the format: docs/gguf.md of ggml. Versions 2 and 3 are read, little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.models.files.gguf.blocks import KINDS, UNSERVED, Kind

# The types of values in a header by their ids, of which 8 is a text and 9 an array.
_TYPES = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8")
_NUMBERS = {number: np.dtype(name) for number, name in enumerate(_TYPES) if name}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
# The fewest bytes in a header: of a tensor the length of its name, dimensions, kind and offset; of a field the length of its
# name, its type and one byte. A damaged count ends there, and not somewhere in what would be read by it.
_LEAST_OF_A_TENSOR, _LEAST_OF_A_FIELD = 8 + 4 + 4 + 8, 8 + 4 + 1


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file: its kind of blocks, its shape (the last dimension runs fastest), its place."""

    kind: Kind
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) // self.kind.numbers * self.kind.bytes


class GgufFile(Mapping[str, Tensor]):
    """Tensors of a GGUF file by their names in it; `fields` is its header, `stored` says how each tensor lies there.

    Raises:
        CheckpointError: no GGUF file, one of another version or byte order, one that is cut short or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        cursor = _Cursor(path, self._bytes)
        tensors, fields = cursor.opening()
        self.fields = self._fields(cursor, fields)
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{path}: general.alignment is {alignment!r}, which is no power of two.")
        found = [cursor.tensor() for _ in range(tensors)]
        begin = -(-cursor.place // alignment) * alignment
        self.stored = {name: Stored(kind, shape, begin + offset) for name, kind, shape, offset in found}
        self._check(len(found), alignment)

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored[name]
        values = self._bytes[stored.begin : stored.begin + stored.size]
        return stored.kind.read(values).reshape(stored.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def kinds(self) -> dict[str, int]:
        """The kinds of blocks of its tensors, and how many tensors each has, the most frequent first."""
        names = [stored.kind.name for stored in self.stored.values()]
        return {name: names.count(name) for name in sorted(set(names), key=names.count, reverse=True)}

    def _fields(self, cursor: _Cursor, count: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for _ in range(count):
            name = cursor.string()
            if name in fields:
                raise CheckpointError(f"{self.path} is damaged: its header has {name} twice.")
            fields[name] = cursor.value(cursor.number(4), name)
        return fields

    def _check(self, count: int, alignment: int) -> None:
        """Raise CheckpointError where tensors do not lie whole in the file, or something lies behind them."""
        if len(self.stored) != count:
            raise CheckpointError(f"{self.path} is damaged: it has two tensors of one name.")
        for name, stored in self.stored.items():
            if stored.shape and stored.shape[-1] % stored.kind.numbers:
                raise CheckpointError(
                    f"{self.path} is damaged: rows of {name} have {stored.shape[-1]} numbers, and blocks of "
                    f"{stored.kind.name} hold {stored.kind.numbers}."
                )
        end = max((stored.begin + stored.size for stored in self.stored.values()), default=0)
        if end > len(self._bytes):
            raise CheckpointError(
                f"{self.path} is cut short: it has {len(self._bytes)} bytes, and its tensors end at {end}. Fetch it again."
            )
        if self.stored and len(self._bytes) - end >= alignment:
            # A count that is too small also moves the place where all tensors begin.
            raise CheckpointError(
                f"{self.path} is damaged: {len(self._bytes) - end} bytes lie behind its {count} tensors. Fetch it again."
            )


class _Cursor:
    """A place in the header of a file, which moves behind what is read."""

    def __init__(self, path: Path, data: np.ndarray[Any, Any]) -> None:
        self._path = path
        self._data = data
        self.place = 0

    def opening(self) -> tuple[int, int]:
        """How many tensors there are, and how many fields; what stands before is checked."""
        magic = bytes(self._data[:4])
        if magic != b"GGUF":
            also = " It is a file of llama.cpp from before GGUF; convert the model anew." if magic[::-1] in _OLD else ""
            raise CheckpointError(f"{self._path} is no GGUF file: it begins with {magic!r}.{also}")
        self.place = 4
        version = self.number(4)
        if version & 0xFFFF == 0:
            raise CheckpointError(f"{self._path} is a big-endian GGUF file; convert it to little endian.")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self._path} is GGUF version {version}; versions 2 and 3 are read. Convert the model anew."
            )
        tensors, fields = self.number(8), self.number(8)
        self._room(tensors * _LEAST_OF_A_TENSOR + fields * _LEAST_OF_A_FIELD)
        return tensors, fields

    def number(self, size: int) -> int:
        """An unsigned number of so many bytes."""
        return int.from_bytes(self._take(size), "little")

    def string(self) -> str:
        return str(self._take(self.number(8)), "utf-8", "replace")

    def value(self, kind: int, name: str) -> Any:
        """A value of a type: a number, a text, an array of numbers, or a list of texts."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number(4), self.number(8)
            if inner == _STRING:
                return self._strings(count)
            if inner in _NUMBERS:
                return np.frombuffer(self._take(count * _NUMBERS[inner].itemsize), _NUMBERS[inner])
            kind = inner
        if kind not in _NUMBERS:
            raise CheckpointError(f"{self._path} is damaged: {name} is of type {kind}, which there is not.")
        return np.frombuffer(self._take(_NUMBERS[kind].itemsize), _NUMBERS[kind])[0].item()

    def tensor(self) -> tuple[str, Kind, tuple[int, ...], int]:
        """Name, kind, shape and offset of a tensor."""
        name, dimensions = self.string(), self.number(4)
        if not name:
            raise CheckpointError(f"{self._path} is damaged: its header has a tensor without a name.")
        if dimensions > _MOST_DIMENSIONS:
            raise CheckpointError(f"{self._path} is damaged: the tensor {name} has {dimensions} dimensions.")
        # The first one runs fastest there, the last one here.
        shape = tuple(self.number(8) for _ in range(dimensions))[::-1]
        number, offset = self.number(4), self.number(8)
        if number not in KINDS:
            choose = f"Choose a file of {', '.join(kind.name for kind in KINDS.values())}."
            kind = f"the tensor {name} is of the kind {UNSERVED.get(number, number)}"
            if number not in UNSERVED:
                raise CheckpointError(f"{self._path} is damaged, or newer than what is read here: {kind}. {choose}")
            raise CheckpointError(f"{self._path}: {kind}, which is not read. {choose}")
        return name, KINDS[number], shape, offset

    def _strings(self, count: int) -> list[str]:
        """Texts one behind another. This runs once per entry of a vocabulary, so it calls nothing of ours."""
        self._room(count * 8)
        data, place, end = self._data.data, self.place, len(self._data)
        length_at, found = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            if place + 8 > end:
                raise self._short()
            (length,) = length_at(data, place)
            place += 8 + length
            if place > end:
                raise self._short()
            found.append(str(data[place - length : place], "utf-8", "replace"))
        self.place = place
        return found

    def _take(self, size: int) -> memoryview:
        self._room(size)
        begin, self.place = self.place, self.place + size
        return self._data.data[begin : self.place]

    def _room(self, size: int) -> None:
        """Raise CheckpointError where fewer bytes are left."""
        if self.place + size > len(self._data):
            raise self._short()

    def _short(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is cut short or damaged: its header goes on behind its {len(self._data)} bytes. Fetch it again."
        )


_OLD = (b"ggml", b"ggmf", b"ggjt")
