"""Rows: vectors of several prompts, end to end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poolhouse.packing.segments import Segments


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Input and output of a step: many rows per prompt before a reduction, one after it.

    values: [rows, features]. segments: which rows are whose. ids: [rows], the token behind each row.
    skip: [prompts], leading rows that pooling leaves out; None where there are none.
    kept: [rows], bool, the rows that token tasks answer with; None where these are all.
    """

    values: Tensor
    segments: Segments
    ids: Tensor
    skip: Tensor | None = None
    kept: Tensor | None = None

    def with_values(self, values: Tensor) -> Rows:
        return replace(self, values=values)

    def one_each(self, values: Tensor) -> Rows:
        """The result of a reduction: values has one row per prompt."""
        segments = Segments((1,) * len(self.segments), self.segments.device)
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

    @property
    def first(self) -> Tensor:
        """[prompts]: the index of the first row that pooling looks at."""
        starts = self.segments.starts_tensor
        if self.skip is None:
            return starts
        skip = self.skip.to(self.segments.device)
        return starts + torch.where(self.segments.lengths_tensor > skip, skip, 0)
