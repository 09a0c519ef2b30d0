"""MUVERA: the vectors of a text as one vector, whose product with that of a query comes near to their MaxSim.

Random planes part the space. The vectors in a part become one: their sum in a query, their mean in a document. The
parts lie end to end, for several draws of planes:

    vectors of a text                     bits, one for each plane     part = the bits as a Gray code
    [rows, width] -- planes ------------> 1 0 1  --------------------> 6
                  -- projection --------> [projection] numbers ------> added to part 6 of this repetition

    encoding      | repetition 0: part 0 | part 1 | .. | part 2**k_sim - 1 | repetition 1: part 0 | ..

A part that holds no vector of a document takes the vector that differs from it in the fewest bits, the first of those. In
a query it is zero. At last a count sketch may fold all numbers into fewer.

Source: Dhulipala et al. 2024, "MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings", arXiv 2405.19504; the
order of parts and the nearest vector as in Google's implementation (graph-mining).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from poolhouse.errors import InvalidRequest, did_you_mean
from poolhouse.vectors.max_sim import RowOffsets, row_offsets
from poolhouse.vectors.precision import Floats, Precision
from poolhouse.vectors.token_embeddings import TokenEmbeddings

Ints = npt.NDArray[np.int64]

# Numbers of an encoding before and after the sketch (1 MiB in float32), draws of planes, and numbers that are drawn.
_MAX_NUMBERS, _MAX_REPETITIONS, _MAX_DRAWN = 2**18, 256, 2**24
# Rows and numbers of encodings at once, and products of rows and projections (16 MiB).
_MAX_ROWS, _MAX_OUT, _MAX_PRODUCTS = 2**13, 2**24, 2**22
# What a seed is joined with, so that what it draws for one purpose tells nothing of another.
_PLANES, _PROJECTIONS, _SKETCH = b"planes", b"projections", b"sketch"


@dataclass(frozen=True, slots=True)
class Muvera:
    """How an encoding is made: those of queries and documents only fit together if they were made alike.

    k_sim: planes of a repetition, which make 2**k_sim parts. repetitions: draws of planes.
    projection: numbers of a part, by random signs; None takes the vectors as they are.
    dimension: length of the encoding, by a count sketch; None leaves all numbers, see `length`.
    fill: whether a part without a vector of a document takes the nearest. seed: what all draws follow from.

    Raises:
        InvalidRequest: a number that cannot be, by its name.
    """

    k_sim: int = 5
    repetitions: int = 20
    projection: int | None = 16
    dimension: int | None = None
    fill: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        _check("k_sim", self.k_sim, 0, 16)
        _check("repetitions", self.repetitions, 1, _MAX_REPETITIONS)
        if self.projection is not None:
            _check("projection", self.projection, 1, _MAX_NUMBERS)
        if self.dimension is not None:
            _check("dimension", self.dimension, 1, _MAX_NUMBERS)
        _check("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.fill, bool):
            raise InvalidRequest(f"muvera: fill must be true or false, got {self.fill!r}.", "muvera.fill", self.fill)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Muvera:
        """The encoding of options by their names.

        Raises:
            InvalidRequest: one that does not exist, or cannot be.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = did_you_mean(str(name), known)
                raise InvalidRequest(f"muvera has no option {name!r}, but {', '.join(known)}.{near}", f"muvera.{name}")
        return cls(**options)

    def length(self, width: int) -> int:
        """How many numbers the encoding of vectors of this width has.

        Raises:
            InvalidRequest: too many; or a projection, or a sketch, to more numbers than there are.
        """
        own = width if self.projection is None else self.projection
        numbers = self.repetitions * 2**self.k_sim * own
        if own > width:
            raise InvalidRequest(
                f"muvera: projection is at most the width of the vectors, {width}, got {own}.", "muvera.projection", own
            )
        drawn = self.repetitions * width * (3 * self.k_sim + (own if own < width else 0))
        if numbers > _MAX_NUMBERS or drawn > _MAX_DRAWN:
            raise InvalidRequest(
                f"muvera: repetitions * 2**k_sim * projection is {numbers}, where {_MAX_NUMBERS} is the most, and {drawn} "
                f"numbers would be drawn, where {_MAX_DRAWN} is; lower one of the three.",
                "muvera.repetitions",
                self.repetitions,
            )
        if self.dimension is not None and self.dimension > numbers:
            raise InvalidRequest(
                f"muvera: dimension is at most repetitions * 2**k_sim * projection, {numbers}, got {self.dimension}.",
                "muvera.dimension",
                self.dimension,
            )
        return numbers if self.dimension is None else self.dimension

    def checked(self, precision: Precision, field: str = "precision") -> Precision:
        """A precision that encodings can have.

        Raises:
            InvalidRequest: int8 and uint8, whose steps are those of unit vectors or of stored ranges; naming `field`.
        """
        if precision in ("int8", "uint8"):
            raise InvalidRequest(
                f"{field}={precision!r} is for vectors of unit length or known ranges, which encodings of MUVERA are not; "
                "float16 and binary are smaller too.",
                field,
                precision,
            )
        return precision

    def encode(self, texts: Sequence[Floats] | TokenEmbeddings, *, queries: bool = False) -> Floats:
        """The encoding of each text, [texts, length]; of one without vectors zeros.

        texts: at least one, [rows, width] each. queries: what they are; else documents.

        Raises:
            InvalidRequest: vectors of different widths, or what `length` raises.
        """
        if isinstance(texts, TokenEmbeddings):
            return self.encode_packed(texts.floats(), texts.offsets, queries=queries)
        if len({text.shape[1] for text in texts}) != 1:
            raise InvalidRequest(
                "muvera: all texts have vectors of one width, and there is at least one text.", "muvera"
            )
        rows = np.concatenate(texts, dtype=np.float32, casting="same_kind")
        return self.encode_packed(rows, row_offsets([len(text) for text in texts]), queries=queries)

    def encode_packed(self, rows: Floats, offsets: RowOffsets, *, queries: bool = False) -> Floats:
        """The same of rows end to end, [all rows, width]; offsets: [texts + 1], where each text begins, and the end."""
        length, draws = self.length(rows.shape[1]), drawn(self, rows.shape[1])
        encodings = np.empty((len(offsets) - 1, length), np.float32)
        for first, last in _blocks(offsets, max(1, _MAX_OUT // draws.numbers)):
            bounds = offsets[first : last + 1]
            parts = _parts(rows[bounds[0] : bounds[-1]], bounds - bounds[0], draws, queries, self.fill)
            encodings[first:last] = parts if draws.sketch is None else draws.sketch.of(parts)
        return encodings


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """What a seed draws.

    planes: [repetitions, width, k_sim]. projections: [repetitions, width, projection], scaled; None: none.
    """

    planes: Floats
    projections: Floats | None
    sketch: Sketch | None

    @property
    def numbers(self) -> int:
        """Numbers of an encoding before the sketch."""
        repetitions, width, bits = self.planes.shape
        own: int = width if self.projections is None else self.projections.shape[2]
        return int(repetitions * own) * (1 << int(bits))


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """A count sketch: each number is added to one of few, or subtracted.

    order: [numbers], by the place that they go to. signs: [numbers], in that order. places, starts: where the runs of
    one place go, and begin.
    """

    order: Ints
    signs: Floats
    places: Ints
    starts: Ints
    dimension: int

    @classmethod
    def to(cls, places: Ints, signs: Floats, dimension: int) -> Sketch:
        """places: [numbers], from 0 to below dimension. signs: [numbers], 1 or -1."""
        order = np.argsort(places, kind="stable")
        starts = _starts(places[order])
        return cls(order, signs[order], places[order][starts], starts, dimension)

    def of(self, vectors: Floats) -> Floats:
        """[texts, dimension] of [texts, numbers]."""
        folded = np.zeros((len(vectors), self.dimension), np.float32)
        folded[:, self.places] = np.add.reduceat(vectors[:, self.order] * self.signs, self.starts, axis=1)
        return folded


@lru_cache(maxsize=8)
def drawn(config: Muvera, width: int) -> Draws:
    """The draws of an encoding for vectors of this width: the same numbers on every machine.

    PCG64 draws whole numbers, seeded by numpy's SeedSequence of the seed and a name. What is made of them is exact: a
    number of a plane is the sum of twelve 16-bit numbers less its mean, which is all but normal; a sign is the lowest
    bit of a draw.
    """
    planes = _raw(config.seed, _PLANES, 3 * config.repetitions * width * config.k_sim)
    halves = (planes[:, None] >> np.arange(0, 64, 16, dtype=np.uint64)) & np.uint64(0xFFFF)
    normal = halves.reshape(-1, 12).sum(1).astype(np.int64) - 12 * 0xFFFF // 2
    projections = sketch = None
    if config.projection is not None and config.projection < width:
        shape = (config.repetitions, width, config.projection)
        signs = _signs(_raw(config.seed, _PROJECTIONS, int(np.prod(shape))))
        projections = (signs * np.float32(1 / np.sqrt(config.projection))).reshape(shape)
    if config.dimension is not None:
        raw = _raw(config.seed, _SKETCH, config.repetitions * 2**config.k_sim * (config.projection or width))
        places = ((raw >> np.uint64(1)) % np.uint64(config.dimension)).astype(np.int64)
        sketch = Sketch.to(places, _signs(raw), config.dimension)
    shape = (config.repetitions, width, config.k_sim)
    return Draws(normal.astype(np.float32).reshape(shape), projections, sketch)


def _parts(rows: Floats, offsets: RowOffsets, draws: Draws, queries: bool, fill: bool) -> Floats:
    """The encodings before the sketch, [texts, numbers]."""
    repetitions, width, bits = draws.planes.shape
    texts, parts = len(offsets) - 1, 2**bits
    sides = rows @ _side_by_side(draws.planes) > 0
    codes = sides.reshape(len(rows), repetitions, bits) @ (1 << np.arange(bits)[::-1])
    owner = np.repeat(np.arange(texts) * parts, np.diff(offsets))
    gray = np.arange(parts) ^ (np.arange(parts) >> 1)
    own = width if draws.projections is None else draws.projections.shape[2]
    encodings = np.empty((texts, repetitions, parts, own), np.float32)
    for number, vectors in enumerate(_projected(rows, draws)):
        keys = owner + codes[:, number]
        order = np.argsort(keys, kind="stable")
        starts = _starts(keys[order])
        table, filled = np.zeros((texts * parts, own), np.float32), keys[order[starts]]
        if len(starts):
            table[filled] = np.add.reduceat(vectors[order], starts, axis=0)
        if not queries:
            table[filled] /= np.diff(starts, append=len(order))[:, None].astype(np.float32)
        if fill and not queries:
            empty, nearest = _nearest(filled, order[starts], texts, bits)
            table[empty] = vectors[nearest]
        encodings[:, number] = table.reshape(texts, parts, own)[:, gray]
    return encodings.reshape(texts, -1)


def _projected(rows: Floats, draws: Draws) -> Iterator[Floats]:
    """The rows of each repetition, [rows, projection]; products of several at once, which take half the time."""
    if draws.projections is None:
        yield from [rows] * len(draws.planes)
        return
    repetitions, _, own = draws.projections.shape
    several = max(1, _MAX_PRODUCTS // max(len(rows) * own, 1))
    for first in range(0, repetitions, several):
        products = rows @ _side_by_side(draws.projections[first : first + several])
        yield from products.reshape(len(rows), products.shape[1] // own, own).swapaxes(0, 1)


def _side_by_side(matrices: Floats) -> Floats:
    """[width, all columns] of [matrices, width, columns]."""
    return matrices.transpose(1, 0, 2).reshape(matrices.shape[1], -1)


def _nearest(filled: Ints, first: Ints, texts: int, bits: int) -> tuple[Ints, Ints]:
    """Empty parts of texts with a vector, and the row of each that differs in the fewest bits, the first of those.

    filled: parts with rows. first: the first row of each. A distance and a row are one number, which is least for the
    row that is sought. To be one bit further away adds a step; so one pass per bit finds the least of all parts.
    """
    step = int(first.max(initial=0)) + 1
    none = (bits + 1) * step
    least = np.full((texts, 2**bits), none, np.int64)
    least.reshape(-1)[filled] = first
    for bit in range(bits):
        halves = least.reshape(texts, -1, 2, 2**bit)
        np.minimum(halves, halves[:, :, ::-1] + step, out=halves)
    least = least.reshape(-1)
    (empty,) = np.nonzero((least >= step) & (least < none))
    return empty, least[empty] % step


def _blocks(offsets: RowOffsets, max_texts: int) -> list[tuple[int, int]]:
    """Runs of texts, from and to, of so many rows or one text."""
    blocks, first, texts = [], 0, len(offsets) - 1
    while first < texts:
        last = int(np.searchsorted(offsets, offsets[first] + _MAX_ROWS, "right")) - 1
        last = min(max(last, first + 1), first + max_texts, texts)
        blocks.append((first, last))
        first = last
    return blocks


def _starts(ordered: Ints) -> Ints:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.diff(ordered, prepend=-1))


def _raw(seed: int, name: bytes, count: int) -> npt.NDArray[np.uint64]:
    """So many draws of 64 bits of the stream of this name."""
    sequence = np.random.SeedSequence([seed, int.from_bytes(name, "big")])
    return np.random.PCG64(sequence).random_raw(count)


def _signs(raw: npt.NDArray[np.uint64]) -> Floats:
    return (raw & np.uint64(1)).astype(np.float32) * 2 - 1


def _check(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(
            f"muvera: {name} must be a whole number from {least} to {most}, got {value!r}.", f"muvera.{name}", value
        )
