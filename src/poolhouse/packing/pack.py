"""Pack: a batch of prompts end to end, as tensors on one device; segments say where each lies, pictures what it shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from poolhouse.packing.tokens import Marks, Picture, Tokens


class AdapterRows(NamedTuple):
    """Rows [start, end) of a pack that belong to the adapter of that name."""

    adapter: str
    start: int
    end: int


class Prefix(NamedTuple):
    """Rows of a pack, from `start` on, that come before those of a sequence: the beginning that it shares with others."""

    start: int
    length: int


NO_PREFIX = Prefix(0, 0)


class Run(NamedTuple):
    """Neighbouring sequences of one shape and one prefix, from row `start` on: how many, their length, tokens attended to."""

    start: int
    sequences: int
    length: int
    keys: int
    prefix: Prefix


class Segments:
    """Lengths of sequences that lie end to end, with everything derived from them computed once.

    lengths: tokens of each sequence, none of them 0 before pooling.
    starts, ends: where each sequence begins and stops, as plain integers.
    attended: leading tokens of each sequence that its tokens attend to, at least one; None where all are.
    adapters: the name of each sequence's adapter, None for a sequence without; None where all go without.
    adapter_rows: the rows of adapters; neighbouring sequences with the same adapter share an entry.
    prefixes: rows that come before each sequence and are attended to as its first ones, `NO_PREFIX` for a sequence
    without; None where all go without. See `poolhouse.packing.prefixes`.
    The tensors live on `device`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        attended: Sequence[int] | None = None,
        adapters: Sequence[str | None] | None = None,
        prefixes: Sequence[Prefix] | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        self.attended = None if attended is None else tuple(attended)
        self.device = torch.device(device)
        bounds = list(accumulate(self.lengths, initial=0))
        self.starts = bounds[:-1]
        self.ends = bounds[1:]
        self.total = bounds[-1]
        self.longest = max(self.lengths, default=0)
        self.adapter_rows = () if adapters is None else self._rows_of(adapters)
        self.prefixes = None if prefixes is None else tuple(prefixes)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def lengths_tensor(self) -> Tensor:
        """[sequences], int64."""
        return torch.tensor(self.lengths, dtype=torch.int64).to(self.device, non_blocking=True)

    @cached_property
    def starts_tensor(self) -> Tensor:
        """[sequences], int64."""
        return torch.tensor(self.starts, dtype=torch.int64).to(self.device, non_blocking=True)

    @cached_property
    def last_tensor(self) -> Tensor:
        """[sequences], int64: the row of each sequence's last token."""
        return torch.tensor(self.ends, dtype=torch.int64).to(self.device, non_blocking=True) - 1

    @cached_property
    def cumulative(self) -> Tensor:
        """[sequences + 1], int32: bounds as variable-length attention kernels want them."""
        return torch.tensor([0, *self.ends], dtype=torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def keys(self) -> tuple[Tensor, Tensor, int]:
        """Rows that each sequence attends to, those of its prefix first ([keys], int64); their bounds as `cumulative` has
        those of all rows; and the most of one sequence."""
        prefixes = self.prefixes or (NO_PREFIX,) * len(self)
        attended = self.attended or self.lengths
        counts = [prefix.length + count for prefix, count in zip(prefixes, attended, strict=True)]
        rows = [
            np.arange(first, first + count)
            for prefix, start, own in zip(prefixes, self.starts, attended, strict=True)
            for first, count in (prefix, (start, own))
        ]
        bounds = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(self.device, non_blocking=True)
        return on_device(np.concatenate(rows), self.device), bounds, max(counts)

    @cached_property
    def owner(self) -> Tensor:
        """[total], int64: which sequence each row belongs to."""
        index = torch.arange(len(self.lengths), device=self.device)
        return torch.repeat_interleave(index, self.lengths_tensor, output_size=self.total)

    @cached_property
    def positions(self) -> Tensor:
        """[total], int64: the position of each row in its own sequence, from 0."""
        return torch.arange(self.total, device=self.device) - self.starts_tensor[self.owner]

    @cached_property
    def runs(self) -> list[Run]:
        """Neighbouring sequences that are alike, together."""
        runs: list[Run] = []
        prefixes = self.prefixes or (NO_PREFIX,) * len(self.lengths)
        shapes = zip(self.starts, self.lengths, self.attended or self.lengths, prefixes, strict=True)
        for start, length, keys, prefix in shapes:
            if runs and runs[-1][2:] == (length, keys, prefix):
                runs[-1] = Run(runs[-1].start, runs[-1].sequences + 1, length, keys, prefix)
            else:
                runs.append(Run(start, 1, length, keys, prefix))
        return runs

    @cached_property
    def table(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """[sequences, 5], as the compiled attention wants them.

        Each one's first row, its length, the tokens attended to, and the first row and length of a prefix before it.
        """
        keys = self.lengths if self.attended is None else self.attended
        prefixes = self.prefixes or (NO_PREFIX,) * len(self.lengths)
        columns = (self.starts, self.lengths, keys, *zip(*prefixes, strict=True))
        return np.ascontiguousarray(np.array(columns, np.int64).T)

    def _rows_of(self, adapters: Sequence[str | None]) -> tuple[AdapterRows, ...]:
        rows: list[AdapterRows] = []
        for name, start, end in zip(adapters, self.starts, self.ends, strict=True):
            if name is None:
                continue
            if rows and rows[-1].adapter == name and rows[-1].end == start:
                rows[-1] = AdapterRows(name, rows[-1].start, end)
            else:
                rows.append(AdapterRows(name, start, end))
        return tuple(rows)


@dataclass(frozen=True, slots=True, eq=False)
class PackedPictures:
    """The pictures of a pack, each once, however many prompts show it.

    pictures: in the order in which a tower gives their rows. pixels: of all, one after another, as they came.
    filled: [rows] int64, the rows of the pack that take a row of the tower, ascending.
    source: [rows] int64, which of the tower's rows each takes; None where that is their order.
    axes: [3, total] int64 positions in time, down and across; None where positions are plain.
    prompts: the numbers of the prompts that show pictures.
    """

    pictures: tuple[Picture, ...]
    pixels: Tensor
    filled: Tensor
    source: Tensor | None = None
    axes: Tensor | None = None
    prompts: tuple[int, ...] = ()

    @classmethod
    def of(cls, prompts: Sequence[Tokens], device: torch.device | str) -> PackedPictures | None:
        """Those of prompts that lie end to end; None where none shows a picture."""
        shown = tuple(number for number, prompt in enumerate(prompts) if prompt.pictures is not None)
        if not shown:
            return None
        first_rows: dict[int, int] = {}
        distinct: list[Picture] = []
        source: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        rows = 0
        for prompt in prompts:
            for picture in () if prompt.pictures is None else prompt.pictures.pictures:
                if id(picture) not in first_rows:
                    first_rows[id(picture)] = rows
                    distinct.append(picture)
                    rows += picture.rows
                begin = first_rows[id(picture)]
                source.append(np.arange(begin, begin + picture.rows))
        filled = np.concatenate(
            [np.zeros(len(prompt), bool) if (own := prompt.pictures) is None else own.filled for prompt in prompts]
        ).nonzero()[0]
        taken = np.concatenate(source)
        axes = None
        if any(prompt.pictures is not None and prompt.pictures.axes is not None for prompt in prompts):
            axes = np.concatenate([_axes_of(prompt) for prompt in prompts], axis=1)
        # A large page goes alone, and is not copied.
        pixels = distinct[0].pixels if len(distinct) == 1 else np.concatenate([picture.pixels for picture in distinct])
        return cls(
            pictures=tuple(distinct),
            pixels=torch.from_numpy(pixels).to(device, non_blocking=True),
            filled=on_device(filled, device),
            source=None if len(taken) == rows else on_device(taken, device),
            axes=None if axes is None else on_device(axes, device),
            prompts=shown,
        )

    def taken(self, rows: Tensor) -> Tensor:
        """The row of the tower that each place of the pack takes."""
        return rows if self.source is None else rows[self.source]

    def each(self) -> Iterator[PackedPictures]:
        """Every picture by itself, for towers that take one at a time; it fills nothing."""
        lengths = [len(picture.pixels) for picture in self.pictures]
        for picture, pixels in zip(self.pictures, self.pixels.split(lengths), strict=True):
            yield PackedPictures((picture,), pixels, self.filled[:0])

    def more(self, name: str) -> Tensor:
        """What pictures hold under that name beside pixels, one after another."""
        held = np.concatenate([picture.more[name] for picture in self.pictures])
        return torch.from_numpy(held).to(self.pixels.device, non_blocking=True)


def _axes_of(prompt: Tokens) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    if prompt.pictures is not None and prompt.pictures.axes is not None:
        return prompt.pictures.axes
    return np.broadcast_to(np.arange(len(prompt)), (3, len(prompt)))


@dataclass(frozen=True, slots=True, eq=False)
class PackedMarks:
    """Where labels and words of a pack stand; see `Marks`.

    labels, words: [labels], [words] of all prompts by 2, int64, rows of the pack. points: [points], likewise.
    of_labels, of_words: how many each prompt has, as segments of these. thresholds: [prompts] float32.
    """

    labels: Tensor
    words: Tensor
    points: Tensor
    of_labels: Segments
    of_words: Segments
    thresholds: Tensor

    @classmethod
    def of(cls, marks: Sequence[Marks], starts: Sequence[int], device: torch.device | str) -> PackedMarks:
        """Those of prompts that lie end to end. starts: the first row of each."""

        def rows(parts: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]) -> Tensor:
            moved = [part + start for part, start in zip(parts, starts, strict=True)]
            return on_device(np.concatenate(moved), device)

        return cls(
            labels=rows([own.labels for own in marks]),
            words=rows([own.words for own in marks]),
            points=rows([own.points for own in marks]),
            of_labels=Segments([len(own.labels) for own in marks], device),
            of_words=Segments([len(own.words) for own in marks], device),
            thresholds=torch.tensor([own.threshold for own in marks]).to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """The rows of a pack that are read at all, one of each prompt; what is behind them in the last layer is not needed.

    rows: [prompts] int64. segments: of these rows, one long each.
    """

    rows: Tensor
    segments: Segments


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Packed token ids and what a backbone needs to know of each token.

    ids: [total] int64. positions: [total] int64, from 0 in each sequence, or from the end of its prefix.
    types: [total] int64 token types, or None where all are 0. pictures: those of all prompts; None for texts alone.
    read: what is read of the answer, for backbones that then answer with no more (`Backbone.picks`); None: all rows.
    """

    ids: Tensor
    positions: Tensor
    segments: Segments
    types: Tensor | None = None
    pictures: PackedPictures | None = None
    read: Read | None = None

    @classmethod
    def pack(
        cls,
        prompts: Sequence[Tokens],
        device: torch.device | str = "cpu",
        adapters: Sequence[str | None] | None = None,
        prefixes: Sequence[Prefix] | None = None,
    ) -> Batch:
        """Lay prompts end to end, in this order. adapters, prefixes: see `Segments`; positions go on behind a prefix."""
        attended = None
        if any(prompt.attended is not None for prompt in prompts):
            attended = [len(prompt) if prompt.attended is None else prompt.attended for prompt in prompts]
        segments = Segments([len(prompt) for prompt in prompts], device, attended, adapters, prefixes)
        ids = np.concatenate([prompt.ids for prompt in prompts])
        before = (0,) * len(segments) if prefixes is None else [prefix.length for prefix in prefixes]
        positions = np.concatenate(
            [np.arange(first, first + length) for first, length in zip(before, segments.lengths, strict=True)]
        )
        types = None
        if any(prompt.types is not None for prompt in prompts):
            types = np.concatenate(
                [np.zeros_like(prompt.ids) if prompt.types is None else prompt.types for prompt in prompts]
            )
        return cls(
            ids=on_device(ids, device),
            positions=on_device(positions, device),
            segments=segments,
            types=None if types is None else on_device(types, device),
            pictures=PackedPictures.of(prompts, device),
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


def on_device(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]], device: torch.device | str) -> Tensor:
    """The numbers as a tensor, copied without waiting."""
    return torch.from_numpy(array).to(device, non_blocking=True)
