"""Batch: several prompts end to end, as tensors on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from poolhouse.segments import Segments
from poolhouse.tokens import Tokens


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
    def pack(cls, prompts: Sequence[Tokens], device: torch.device | str = "cpu") -> Batch:
        """Lay prompts end to end, in the order given."""
        segments = Segments([len(prompt) for prompt in prompts], device)
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


def _to(array: np.ndarray[tuple[int], np.dtype[np.int64]], device: torch.device | str) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
