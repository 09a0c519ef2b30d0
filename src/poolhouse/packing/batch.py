"""Batch: several prompts end to end, as tensors on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from poolhouse.packing.segments import Segments
from poolhouse.packing.tokens import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Packed token ids and what a backbone needs to know of each token.

    ids: [total] int64. positions: [total] int64, from 0 in each sequence.
    types: [total] int64 token types, or None where all are 0.
    """

    ids: Tensor
    positions: Tensor
    segments: Segments
    types: Tensor | None = None

    @classmethod
    def pack(
        cls,
        prompts: Sequence[Tokens],
        device: torch.device | str = "cpu",
        adapters: Sequence[str | None] | None = None,
    ) -> Batch:
        """Lay prompts end to end, in this order. adapters: see `Segments`."""
        attended = None
        if any(prompt.attended is not None for prompt in prompts):
            attended = [len(prompt) if prompt.attended is None else prompt.attended for prompt in prompts]
        segments = Segments([len(prompt) for prompt in prompts], device, attended, adapters)
        ids = np.concatenate([prompt.ids for prompt in prompts])
        positions = np.concatenate([np.arange(length) for length in segments.lengths])
        types = None
        if any(prompt.types is not None for prompt in prompts):
            types = np.concatenate(
                [np.zeros_like(prompt.ids) if prompt.types is None else prompt.types for prompt in prompts]
            )
        return cls(
            ids=_to(ids, device),
            positions=_to(positions, device),
            segments=segments,
            types=None if types is None else _to(types, device),
        )

    def positions_without(self, token: int) -> Tensor:
        """[total], positions where a token is not counted: -1 for itself, for others the number of others before it."""
        uncounted = self.ids == token
        # On a GPU this test would make the host wait for the device.
        if not uncounted.is_cuda and not uncounted.any():
            return self.positions
        before = uncounted.cumsum(0) - uncounted.long()
        starts = torch.arange(len(before), device=before.device) - self.positions
        return torch.where(uncounted, -1, self.positions - before + before[starts])


def _to(array: np.ndarray[tuple[int], np.dtype[np.int64]], device: torch.device | str) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
