"""Stopwatch: seconds that steps of a batch take on its device, read without making it wait."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class Stopwatch:
    """Marks moments; on CUDA the device notes them when it gets there."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._moments: list[float] = []

    def mark(self) -> None:
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next; only once the device has passed the last one."""
        if self._on_cuda:
            return [first.elapsed_time(second) / 1000 for first, second in pairwise(self._events)]
        return [second - first for first, second in pairwise(self._moments)]
