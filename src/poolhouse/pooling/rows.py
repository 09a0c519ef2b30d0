"""Rows: vectors of several prompts, end to end, and the reductions to one per prompt by their public names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse import kernels
from poolhouse.outputs import Array
from poolhouse.packing.pack import PackedMarks, Segments

_MEANS = (
    *(kernels.ADDRESS, kernels.COUNT, kernels.COUNT, kernels.ADDRESS, kernels.COUNT),
    *(kernels.ADDRESS, kernels.COUNT, kernels.COUNT),
)
_UNITS = (kernels.ADDRESS, *[kernels.COUNT] * 3, kernels.ADDRESS, kernels.COUNT)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Input and output of a step: many rows per prompt before a reduction, one after it.

    values: [rows, features]. segments: which rows are whose. ids: [rows], the token behind each row.
    skip: [prompts], leading rows that pooling leaves out; None where there are none.
    kept: [rows], bool, the rows that token tasks answer with; None where these are all.
    marks: where labels and words stand, of prompts with labels.
    """

    values: Tensor
    segments: Segments
    ids: Tensor
    skip: Tensor | None = None
    kept: Tensor | None = None
    marks: PackedMarks | None = None

    def with_values(self, values: Tensor) -> Rows:
        return replace(self, values=values)

    def one_each(self, values: Tensor) -> Rows:
        """The result of a reduction: values has one row per prompt."""
        segments = Segments((1,) * len(self.segments), self.segments.device)
        if len(segments) == 1 and len(self.ids):
            return Rows(values, segments, self.ids[:1])
        # A prompt without rows gets the id of the next token, which nobody reads.
        last = max(len(self.ids) - 1, 0)
        ids = self.ids if len(self.ids) else self.ids.new_zeros(1)
        return Rows(values, segments, ids[self.segments.starts_tensor.clamp(max=last)])

    def select(self, kept: Tensor) -> Rows:
        """The rows where `kept` ([rows], bool) is true; a prompt may be left with none."""
        counts = torch.zeros(len(self.segments), dtype=torch.int64, device=kept.device)
        counts.index_add_(0, self.segments.owner, kept.long())
        return Rows(self.values[kept], Segments(counts.tolist(), self.segments.device), self.ids[kept])

    def pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that pooling looks at: values in float32, their positions, and how many each prompt has."""
        segments = self.segments
        values = self.values.float()
        if self.skip is None:
            return values, segments.positions, segments.lengths_tensor
        skip = self.skip.to(segments.device)
        kept = segments.positions >= skip[segments.owner]
        lengths = (segments.lengths_tensor - skip).clamp(min=0)
        return values[kept], segments.positions[kept], lengths

    def owned_by_numpy(self) -> Array:
        """The values in memory of numpy's own, for a caller to keep.

        A tensor that goes lets go of the interpreter's lock and takes it again. A daemon thread that drops an answer while
        the interpreter ends would never get it, within a destructor that must not fail, which ends the process by SIGABRT.
        """
        return np.array(self.values.numpy())

    @property
    def first(self) -> Tensor:
        """[prompts]: the index of the first row that pooling looks at."""
        starts = self.segments.starts_tensor
        if self.skip is None:
            return starts
        skip = self.skip.to(self.segments.device)
        return starts + torch.where(self.segments.lengths_tensor > skip, skip, 0)


Reduction = Callable[[Rows], Tensor]


def cls(rows: Rows) -> Tensor:
    """The first row of each prompt."""
    return rows.values[rows.first].float()


def last(rows: Rows) -> Tensor:
    """The last row of each prompt."""
    return rows.values[rows.segments.last_tensor].float()


def mean(rows: Rows) -> Tensor:
    """The mean of each prompt's rows."""
    values, segments = rows.values, rows.segments
    if rows.skip is None and _is_plain(values, torch.float32, torch.bfloat16):
        kernel = kernels.function("poolhouse_means", *_MEANS)
        if kernel is not None:
            means = torch.empty(len(segments), values.shape[1])
            given = (values.data_ptr(), values.stride(0), values.shape[1], segments.table.ctypes.data, len(segments))
            kernel(*given, means.data_ptr(), values.dtype == torch.bfloat16, torch.get_num_threads())
            return means
    total, lengths = _sum(rows)
    return total / lengths


def mean_sqrt_len(rows: Rows) -> Tensor:
    """The sum divided by the root of the length, as in sentence-transformers."""
    total, lengths = _sum(rows)
    return total / lengths.sqrt()


def largest(rows: Rows) -> Tensor:
    """The maximum of each feature."""
    values, _, lengths = rows.pooled()
    return torch.segment_reduce(values, "max", lengths=lengths)


def weighted_mean(rows: Rows) -> Tensor:
    """The mean weighted by position, 1 for the first token (SGPT, Muennighoff 2022)."""
    values, positions, lengths = rows.pooled()
    weights = (positions + 1).float()[:, None]
    return _sums(values * weights, lengths) / _sums(weights, lengths).clamp(min=1e-9)


# Sums are in float32. The public names, upper case as in vLLM; several joined by "+" are concatenated.
REDUCTIONS: dict[str, Reduction] = {
    "CLS": cls,
    "LAST": last,
    "MEAN": mean,
    "MAX": largest,
    "WEIGHTEDMEAN": weighted_mean,
    "MEAN_SQRT_LEN": mean_sqrt_len,
}


def unit(values: Tensor) -> Tensor:
    """[rows, features] over the length of each row, as `F.normalize`, which takes twice as long to call."""
    if _is_plain(values, torch.float32):
        kernel = kernels.function("poolhouse_units", *_UNITS)
        if kernel is not None:
            units = torch.empty(values.shape)
            given = (values.data_ptr(), len(values), values.stride(0), values.shape[1])
            kernel(*given, units.data_ptr(), torch.get_num_threads())
            return units
    lengths: Tensor = torch.linalg.vector_norm(values, 2, -1, True)
    return values / lengths.clamp_min_(1e-12)


def _is_plain(values: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether a kernel can read a matrix."""
    plain = values.dtype in dtypes and values.device.type == "cpu" and values.ndim == 2 and not values.requires_grad
    return plain and values.shape[1] % 16 == 0 and values.stride(1) == 1


def _sum(rows: Rows) -> tuple[Tensor, Tensor]:
    """Sum of each prompt's rows, and their number, never 0: [prompts, features] and [prompts, 1]."""
    if len(rows.segments) == 1 and rows.skip is None and rows.values.device.type != "cpu":
        # On a CPU this sum is another in its last bit, and what a prompt answers would depend on its company.
        lengths = rows.segments.lengths_tensor[:, None].clamp(min=1)
        return rows.values.sum(0, keepdim=True, dtype=torch.float32), lengths.float()
    values, _, lengths = rows.pooled()
    return _sums(values, lengths), lengths[:, None].clamp(min=1).float()


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """The sum of each run of rows: an embedding bag over the rows themselves is the quickest sum that torch has."""
    return F.embedding_bag(
        torch.arange(len(values), device=values.device), values, lengths.cumsum(0) - lengths, mode="sum"
    )
