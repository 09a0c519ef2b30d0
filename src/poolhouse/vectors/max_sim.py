"""MaxSim of arrays: every vector of a query finds its best vector of a document, and their products are added.

Nothing is padded. Products are made a block at a time, which stays in the processor's cache: beside its inputs and a
number per document, a call takes less than 8 MiB, however many and long the texts.
Sums are float32. A text without vectors scores 0. `poolhouse.layers.max_sim` does the same with tensors.

Source: Khattab and Zaharia 2020, "ColBERT".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from poolhouse.vectors.precision import Calibration, Codes, Floats, Precision, dequantize

RowOffsets = npt.NDArray[np.int64]

# Products at once (512 KiB), numbers of documents at once for each (2 MiB), and rows of a query at once.
MAX_PRODUCTS = 2**17
_NUMBERS_PER_PRODUCT = 4
MAX_QUERY_ROWS = 1024


def max_sim(query: Floats, documents: Sequence[Floats]) -> Floats:
    """The score of one query with each document, [documents].

    query: [rows, width]. documents: [rows, width] each.
    """
    lengths = [len(document) for document in documents]
    kept = [document for document in documents if len(document)]
    width = query.shape[-1]
    gathered = np.empty((max_rows(1, width, MAX_PRODUCTS), width), np.float32)

    def rows(block: RowBlock) -> Floats:
        if block.documents == 1:
            start = block.start - block.origin
            return np.asarray(kept[block.first][start : start + block.rows], dtype=np.float32)
        return np.concatenate(kept[block.first : block.last], out=gathered[: block.rows], casting="unsafe")

    return _scores(query, row_offsets(lengths), rows)


def max_sim_packed(
    query: Floats,
    documents: Codes,
    offsets: RowOffsets,
    precision: Precision = "float32",
    calibration: Calibration | None = None,
) -> Floats:
    """The score of one query with each document of a packed matrix, [documents].

    query: [rows, width] floats. documents: [all rows, width] in that precision, end to end ([all rows, width / 8] of
    bits); they are turned back into floats a block at a time. offsets: [documents + 1], where each begins, and the end.
    """

    def rows(block: RowBlock) -> Floats:
        codes = documents[block.start : block.start + block.rows]
        return codes if codes.dtype == np.float32 else dequantize(codes, precision, calibration)

    return _scores(query, offsets, rows)


def max_sim_pairs(queries: Sequence[Floats], documents: Sequence[Floats]) -> Floats:
    """The score of each query with the document at its place, [pairs]; [rows, width] each."""
    scores = np.zeros(len(queries), np.float32)
    heights = np.array([len(query) for query in queries], np.int64)
    widths = np.array([len(document) for document in documents], np.int64)
    large = heights * widths > MAX_PRODUCTS
    for pair in np.flatnonzero(large).tolist():
        scores[pair] = max_sim(queries[pair], [documents[pair]])[0]
    (small,) = np.nonzero((heights * widths > 0) & ~large)
    ends = row_offsets(heights[small] * widths[small])
    products = np.empty(MAX_PRODUCTS, np.float32)
    for block in row_blocks(ends, MAX_PRODUCTS):
        members = small[block.first : block.last]
        starts = ends[block.first : block.last + 1] - block.start
        for pair, start, end in zip(members.tolist(), starts[:-1], starts[1:], strict=True):
            place = products[start:end].reshape(heights[pair], widths[pair])
            np.matmul(queries[pair], documents[pair].T, out=place)
        lines = row_offsets(np.repeat(widths[members], heights[members]))
        best = np.maximum.reduceat(products[: block.rows], lines[:-1])
        scores[members] = np.add.reduceat(best, row_offsets(heights[members])[:-1])
    return scores


def row_offsets(lengths: Sequence[int] | npt.NDArray[np.int64]) -> RowOffsets:
    """Where each of these lengths begins when they lie end to end, and where the last one ends; [lengths + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Whole documents from `first` to before `last`, or a part of one that is longer than a block.

    start, rows: where it lies among all rows. origin: where its first document begins.
    """

    first: int
    last: int
    start: int
    rows: int
    origin: int

    @property
    def documents(self) -> int:
        return self.last - self.first

    @property
    def goes_on(self) -> bool:
        """Whether it is not the first part of its document."""
        return self.start > self.origin


def row_blocks(offsets: RowOffsets, most: int) -> Iterator[RowBlock]:
    """All rows, in blocks of at most so many. offsets: of documents, none of them empty."""
    first, count = 0, len(offsets) - 1
    while first < count:
        start = int(offsets[first])
        last = int(np.searchsorted(offsets, start + most, side="right")) - 1
        if last > first:
            yield RowBlock(first, last, start, int(offsets[last]) - start, start)
            first = last
            continue
        end = int(offsets[first + 1])
        for part in range(start, end, most):
            yield RowBlock(first, first + 1, part, min(most, end - part), start)
        first += 1


def max_rows(query_rows: int, width: int, most_products: int) -> int:
    """How many rows of documents are compared with a query at once."""
    return max(1, min(most_products // query_rows, _NUMBERS_PER_PRODUCT * most_products // max(width, 1)))


def _scores(query: Floats, offsets: RowOffsets, rows: Callable[[RowBlock], Floats]) -> Floats:
    """Scores from what `rows` gives of each block of the documents that are not empty."""
    query = np.asarray(query, dtype=np.float32)
    scores = np.zeros(len(offsets) - 1, np.float32)
    # Of a segment without rows, reduceat would give the row that follows.
    (filled,) = np.nonzero(np.diff(offsets))
    starts = np.append(offsets[filled], offsets[-1])
    for part in range(0, len(query), MAX_QUERY_ROWS):
        scores[filled] += _sums(query[part : part + MAX_QUERY_ROWS], starts, rows)
    return scores


def _sums(query: Floats, offsets: RowOffsets, rows: Callable[[RowBlock], Floats]) -> Floats:
    most = max_rows(len(query), query.shape[1], MAX_PRODUCTS)
    products = np.empty((most, len(query)), np.float32)
    sums = np.empty(len(offsets) - 1, np.float32)
    best = products[:1]
    for block in row_blocks(offsets, most):
        found = np.matmul(rows(block), query.T, out=products[: block.rows])
        starts = np.maximum(offsets[block.first : block.last] - block.start, 0)
        so_far, best = best, np.maximum.reduceat(found, starts, axis=0)
        if block.goes_on:
            np.maximum(best, so_far, out=best)
        # Of a document in parts, the last part's sum stays.
        sums[block.first : block.last] = best.sum(axis=1)
    return sums
