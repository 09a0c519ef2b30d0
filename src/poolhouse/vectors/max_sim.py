"""MaxSim: the late-interaction score of a query with documents, of arrays and of tensors, without padding.

Every vector of a query finds its best vector of a document, and these products are added. Products are computed a block
at a time, which stays in the processor's cache: beside its inputs and a number per document, a call takes less than
8 MiB, however many and long the texts. Sums are float32. A text without vectors scores 0.

    documents, end to end    | d0    | d1 | d2                         | d3  |
    blocks of rows           | d0 and d1  | d2, a part | d2, the rest  | d3  |

A block holds whole documents, or a part of one that is longer than a block. The maxima of a part are carried on to the
next part. Floats are compared by a compiled kernel where there is one (`poolhouse.kernels`), which stores no products.

Source: Khattab and Zaharia 2020, "ColBERT".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from poolhouse import kernels
from poolhouse.vectors.precision import Calibration, Codes, Floats, Precision, dequantize

if TYPE_CHECKING:
    from torch import Tensor

RowOffsets = npt.NDArray[np.int64]

# Products at once (512 KiB), numbers of documents at once for each (2 MiB), and rows of a query at once.
MAX_PRODUCTS = 2**17
_NUMBERS_PER_PRODUCT = 4
MAX_QUERY_ROWS = 1024
# Documents of so many rows are compared where they lie: gathering them costs more than larger products gain.
_LONG = 256
# 64 MiB: few and large kernels suit a GPU.
_MAX_PRODUCTS_ON_DEVICES = 2**24


def max_sim(query: Floats, documents: Sequence[Floats]) -> Floats:
    """The score of one query with each document, [documents].

    query: [rows, width]. documents: [rows, width] each.
    """
    lengths = [len(document) for document in documents]
    query = np.asarray(query, dtype=np.float32)
    if _kernel() is not None and all(_lies_plain(document, query.shape[-1]) for document in documents):
        addresses = [document.__array_interface__["data"][0] for document in documents]
        return _compiled(query, np.array(addresses, np.int64), np.array(lengths, np.int64))
    kept = [document for document in documents if len(document)]
    width = query.shape[-1]
    gathered = np.empty((_max_rows(1, width, MAX_PRODUCTS), width), np.float32)

    def rows(block: _RowBlock) -> Floats:
        if block.documents == 1:
            start = block.start - block.origin
            return np.asarray(kept[block.first][start : start + block.rows], dtype=np.float32)
        return np.concatenate(kept[block.first : block.last], out=gathered[: block.rows], casting="unsafe")

    long = len(kept) > 0 and sum(lengths) >= _LONG * len(kept)
    return _scores(query, row_offsets(lengths), rows, max(lengths) if long else None)


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
    query = np.asarray(query, dtype=np.float32)
    if _kernel() is not None and _lies_plain(documents, query.shape[-1]):
        starts = documents.ctypes.data + np.asarray(offsets[:-1], np.int64) * documents.strides[0]
        return _compiled(query, starts, np.asarray(offsets[1:] - offsets[:-1], np.int64))

    def rows(block: _RowBlock) -> Floats:
        codes = documents[block.start : block.start + block.rows]
        return codes if codes.dtype == np.float32 else dequantize(codes, precision, calibration)

    return _scores(query, offsets, rows)


def max_sim_pairs(queries: Sequence[Floats], documents: Sequence[Floats]) -> Floats:
    """The score of each query with the document of the same index, [pairs]; [rows, width] each."""
    scores = np.zeros(len(queries), np.float32)
    heights = np.array([len(query) for query in queries], np.int64)
    widths = np.array([len(document) for document in documents], np.int64)
    large = heights * widths > MAX_PRODUCTS
    for pair in np.flatnonzero(large).tolist():
        scores[pair] = max_sim(queries[pair], [documents[pair]])[0]
    (small,) = np.nonzero((heights * widths > 0) & ~large)
    ends = row_offsets(heights[small] * widths[small])
    products = np.empty(MAX_PRODUCTS, np.float32)
    for block in _row_blocks(ends, MAX_PRODUCTS):
        members = small[block.first : block.last]
        starts = ends[block.first : block.last + 1] - block.start
        for pair, start, end in zip(members.tolist(), starts[:-1], starts[1:], strict=True):
            out = products[start:end].reshape(heights[pair], widths[pair])
            np.matmul(queries[pair], documents[pair].T, out=out)
        lines = row_offsets(np.repeat(widths[members], heights[members]))
        best = np.maximum.reduceat(products[: block.rows], lines[:-1])
        scores[members] = np.add.reduceat(best, row_offsets(heights[members])[:-1])
    return scores


def max_sim_tensors(query: Tensor, documents: Tensor, offsets: Tensor) -> Tensor:
    """The score of one query with each packed document, on the device of the documents: [documents] float32.

    query: [rows, width]. documents: [all rows, width], end to end; both of any float type, products are float32.
    offsets: [documents + 1] integers, where each document begins, and the end.
    """
    import torch

    with torch.inference_mode():
        bounds: RowOffsets = offsets.to("cpu", torch.int64).numpy()
        filled, starts = _filled(bounds)
        scores = torch.zeros(len(bounds) - 1, device=documents.device)
        indices = torch.from_numpy(filled).to(documents.device)
        for part in range(0, len(query), MAX_QUERY_ROWS):
            scores[indices] += _tensor_sums(query[part : part + MAX_QUERY_ROWS].float(), documents, starts)
    return scores


def row_offsets(lengths: Sequence[int] | npt.NDArray[np.int64]) -> RowOffsets:
    """Where each of these lengths begins when they lie end to end, and where the last one ends; [lengths + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True, slots=True)
class _RowBlock:
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
    def continues(self) -> bool:
        """Whether it is not the first part of its document."""
        return self.start > self.origin


def _row_blocks(offsets: RowOffsets, max_rows: int) -> Iterator[_RowBlock]:
    """All rows, in blocks of at most so many. offsets: of documents, none of them empty."""
    first, count = 0, len(offsets) - 1
    while first < count:
        start = int(offsets[first])
        last = int(np.searchsorted(offsets, start + max_rows, side="right")) - 1
        if last > first:
            yield _RowBlock(first, last, start, int(offsets[last]) - start, start)
            first = last
            continue
        end = int(offsets[first + 1])
        for part in range(start, end, max_rows):
            yield _RowBlock(first, first + 1, part, min(max_rows, end - part), start)
        first += 1


_ARGUMENTS = (
    kernels.ADDRESS,
    *[kernels.COUNT] * 2,
    *[kernels.ADDRESS] * 2,
    kernels.COUNT,
    kernels.ADDRESS,
    kernels.COUNT,
)


def _kernel() -> Callable[..., None] | None:
    return kernels.function("poolhouse_max_sim", *_ARGUMENTS)


def _lies_plain(documents: Codes, width: int) -> bool:
    """Whether the kernel can read rows of that width where they lie."""
    return (
        documents.dtype == np.float32
        and documents.ndim == 2
        and documents.shape[1] == width > 0
        and documents.flags.c_contiguous
    )


def _compiled(query: Floats, addresses: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Floats:
    """The score of each document, [documents]; of each its address and how many rows of floats lie there."""
    kernel = _kernel()
    assert kernel is not None
    query = np.ascontiguousarray(query)
    scores = np.zeros(len(lengths), np.float32)
    part_scores = np.empty_like(scores)
    lengths = np.ascontiguousarray(lengths)
    for first in range(0, len(query), MAX_QUERY_ROWS):
        part = query[first : first + MAX_QUERY_ROWS]
        addressed = (part.ctypes.data, *part.shape, addresses.ctypes.data, lengths.ctypes.data)
        kernel(*addressed, len(lengths), part_scores.ctypes.data, _cores())
        scores += part_scores
    return scores


def _cores() -> int:
    """How many cores this process may use; OMP_NUM_THREADS limits them, as it does for numpy and torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) > 0 else cores


def _max_rows(query_rows: int, width: int, max_products: int) -> int:
    """How many rows of documents are compared with a query at once."""
    return max(1, min(max_products // query_rows, _NUMBERS_PER_PRODUCT * max_products // max(width, 1)))


def _filled(offsets: RowOffsets) -> tuple[npt.NDArray[np.int64], RowOffsets]:
    """The documents that are not empty, and their offsets: of one without rows, reduceat would take the next row."""
    (filled,) = np.nonzero(np.diff(offsets))
    return filled, np.append(offsets[filled], offsets[-1])


def _scores(
    query: Floats, offsets: RowOffsets, rows: Callable[[_RowBlock], Floats], max_rows: int | None = None
) -> Floats:
    """Scores from what `rows` gives of each block of the documents that are not empty. max_rows: of a block."""
    scores = np.zeros(len(offsets) - 1, np.float32)
    filled, starts = _filled(offsets)
    for part in range(0, len(query), MAX_QUERY_ROWS):
        scores[filled] += _sums(query[part : part + MAX_QUERY_ROWS], starts, rows, max_rows)
    return scores


def _sums(
    query: Floats, offsets: RowOffsets, rows: Callable[[_RowBlock], Floats], max_rows: int | None = None
) -> Floats:
    """The score of each document; none of them is empty."""
    fitting = _max_rows(len(query), query.shape[1], MAX_PRODUCTS)
    max_rows = fitting if max_rows is None else min(fitting, max_rows)
    products = np.empty((max_rows, len(query)), np.float32)
    sums = np.empty(len(offsets) - 1, np.float32)
    best = products[:1]
    for block in _row_blocks(offsets, max_rows):
        found = np.matmul(rows(block), query.T, out=products[: block.rows])
        starts = np.maximum(offsets[block.first : block.last] - block.start, 0)
        so_far, best = best, np.maximum.reduceat(found, starts, axis=0)
        if block.continues:
            np.maximum(best, so_far, out=best)
        # Of a document in parts, the last part's sum stays.
        sums[block.first : block.last] = best.sum(axis=1)
    return sums


def _tensor_sums(query: Tensor, documents: Tensor, offsets: RowOffsets) -> Tensor:
    """`_sums` with the kernels of the documents' device."""
    import torch

    max_products = MAX_PRODUCTS if documents.device.type == "cpu" else _MAX_PRODUCTS_ON_DEVICES
    on_device = torch.from_numpy(offsets).to(documents.device)
    sums = torch.empty(len(offsets) - 1, device=documents.device)
    best = query
    for block in _row_blocks(offsets, _max_rows(len(query), query.shape[1], max_products)):
        products = documents[block.start : block.start + block.rows].float() @ query.T
        bounds = (on_device[block.first : block.last + 1] - block.start).clamp(0, block.rows)
        so_far, best = best, torch.segment_reduce(products, "max", offsets=bounds, axis=0, unsafe=True)
        if block.continues:
            best = best.maximum(so_far)
        sums[block.first : block.last] = best.sum(dim=1)
    return sums
