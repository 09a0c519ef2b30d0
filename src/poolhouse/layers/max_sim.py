"""MaxSim of tensors, on the device where they are: one query with packed documents, without padding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from poolhouse.vectors.max_sim import MAX_PRODUCTS, MAX_QUERY_ROWS, RowOffsets, max_rows, row_blocks

# 64 MiB, for few and large kernels; on the CPU products stay in its cache.
_MAX_PRODUCTS_ON_DEVICES = 2**24


@torch.inference_mode()
def max_sim(query: Tensor, documents: Tensor, offsets: Tensor) -> Tensor:
    """The score of one query with each packed document, [documents] float32; 0 for texts without vectors.

    query: [rows, width]. documents: [all rows, width], end to end; both of any float type, products are float32.
    offsets: [documents + 1] integers, where each document begins, and the end.
    """
    bounds: RowOffsets = offsets.to("cpu", torch.int64).numpy()
    (filled,) = np.nonzero(np.diff(bounds))
    starts = np.append(bounds[filled], bounds[-1])
    scores = torch.zeros(len(bounds) - 1, device=documents.device)
    places = torch.from_numpy(filled).to(documents.device)
    for part in range(0, len(query), MAX_QUERY_ROWS):
        scores[places] += _sums(query[part : part + MAX_QUERY_ROWS].float(), documents, starts)
    return scores


def _sums(query: Tensor, documents: Tensor, offsets: RowOffsets) -> Tensor:
    """The score of each document; none of them is empty."""
    on_cpu = documents.device.type == "cpu"
    most = max_rows(len(query), query.shape[1], MAX_PRODUCTS if on_cpu else _MAX_PRODUCTS_ON_DEVICES)
    there = torch.from_numpy(offsets).to(documents.device)
    sums = torch.empty(len(offsets) - 1, device=documents.device)
    best = query
    for block in row_blocks(offsets, most):
        products = documents[block.start : block.start + block.rows].float() @ query.T
        bounds = (there[block.first : block.last + 1] - block.start).clamp(0, block.rows)
        so_far, best = best, torch.segment_reduce(products, "max", offsets=bounds, axis=0, unsafe=True)
        if block.goes_on:
            best = best.maximum(so_far)
        # Of a document in parts, the last part's sum stays.
        sums[block.first : block.last] = best.sum(dim=1)
    return sums
