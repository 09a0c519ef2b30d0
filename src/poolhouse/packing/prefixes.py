"""Prefixes: what prompts of a batch have in common at their beginnings, found by their ids, lies in the pack once.

    prompts    [query A | document 1]  [query A | document 2]  [query B | document 3]  [query B | document 4]  [text]

    pack       [query A][document 1][document 2][query B][document 3][document 4][text]

Only causal models may run such a pack: a token of theirs depends on what is before it alone, so the hidden states of a
beginning are those of every prompt that begins so. A rest sees its prefix and itself (`Segments.prefixes`), and its
positions go on behind the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from poolhouse.packing.pack import NO_PREFIX, Batch, Prefix, Segments
from poolhouse.packing.tokens import Ids, Tokens

# A shorter beginning, or one that saves fewer tokens, costs more in calls of attention than it saves.
_SMALLEST_PREFIX = 8
_SMALLEST_SAVING = 64


class Beginning(NamedTuple):
    """Prompts that begin with the same tokens: their numbers, ascending, and how many tokens."""

    members: tuple[int, ...]
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class SharedPack:
    """Prompts in a pack that holds their common beginnings once.

    batch: what runs. segments, ids: of the prompts, as if each lay there whole. rows: [total of the prompts], the row
    of `batch` that each of their tokens has.
    """

    batch: Batch
    segments: Segments
    ids: Tensor
    rows: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[Tokens],
        device: torch.device | str = "cpu",
        adapters: Sequence[str | None] | None = None,
        max_tokens: int | None = None,
    ) -> SharedPack | None:
        """None where sharing is not worth it. Only prompts of one adapter share, and none longer than max_tokens."""
        beginnings = _worthwhile(prompts, adapters or (None,) * len(prompts), max_tokens)
        if not beginnings:
            return None
        pieces: list[Tokens] = []
        prefixes: list[Prefix] = []
        owners: list[str | None] = []
        begins = [0] * len(prompts)
        total = 0
        # The rows of each prompt: of its prefix, then its own.
        rows: list[tuple[Ids, Ids]] = [(_NO_ROWS, _NO_ROWS)] * len(prompts)

        def lay(piece: Tokens, prefix: Prefix, number: int) -> Ids:
            nonlocal total
            pieces.append(piece)
            prefixes.append(prefix)
            owners.append(None if adapters is None else adapters[number])
            total += len(piece)
            return np.arange(total - len(piece), total)

        shared = {beginning.members[0]: beginning for beginning in beginnings}
        led = {number for beginning in beginnings for number in beginning.members[1:]}
        for number, prompt in enumerate(prompts):
            if number in led:
                continue
            if number not in shared:
                rows[number] = (_NO_ROWS, lay(prompt, NO_PREFIX, number))
                continue
            members, length = shared[number]
            common = lay(Tokens(prompt.ids[:length]), NO_PREFIX, number)
            prefix = Prefix(total - length, length)
            for member in members:
                begins[member] = length
                rows[member] = (common, lay(Tokens(prompts[member].ids[length:]), prefix, member))
        placed = np.concatenate([part for own in rows for part in own])
        return cls(
            Batch.pack(pieces, device, None if adapters is None else owners, prefixes),
            Segments([len(prompt) for prompt in prompts], device, adapters=adapters),
            torch.from_numpy(np.concatenate([prompt.ids for prompt in prompts])).to(device, non_blocking=True),
            torch.from_numpy(placed).to(device, non_blocking=True),
        )

    @property
    def saved(self) -> int:
        """Tokens that are not computed again."""
        return self.segments.total - self.batch.segments.total


_NO_ROWS: Ids = np.empty(0, np.int64)


def common_beginnings(prompts: Sequence[Ids], numbers: Sequence[int]) -> list[Beginning]:
    """The beginnings that are worth sharing among those of these numbers; no prompt is in two, and each keeps a rest."""
    alike: dict[bytes, list[int]] = {}
    for number in numbers:
        if len(prompts[number]) > _SMALLEST_PREFIX:
            alike.setdefault(prompts[number][:_SMALLEST_PREFIX].tobytes(), []).append(number)
    found: list[Beginning] = []
    for members in alike.values():
        if len(members) < 2:
            continue
        # In this order what two prompts have in common, all between them have too.
        members.sort(key=lambda number: prompts[number].tobytes())
        for first, end, length in _best_groups(_in_common([prompts[number] for number in members])):
            found.append(Beginning(tuple(sorted(members[first:end])), length))
    return found


def _worthwhile(prompts: Sequence[Tokens], adapters: Sequence[str | None], max_tokens: int | None) -> list[Beginning]:
    """The beginnings that these prompts may share."""
    by_adapter: dict[str | None, list[int]] = {}
    for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        if prompt.pictures is not None:
            # Rows of pictures and positions of three axes are counted over whole prompts.
            return []
        if prompt.types is None and prompt.attended is None and (max_tokens is None or len(prompt) <= max_tokens):
            by_adapter.setdefault(adapter, []).append(number)
    ids = [prompt.ids for prompt in prompts]
    return [beginning for numbers in by_adapter.values() for beginning in common_beginnings(ids, numbers)]


def _in_common(prompts: Sequence[Ids]) -> list[int]:
    """How many tokens each prompt and the next begin with together, less one where that is all of either."""
    lengths = np.array([len(prompt) for prompt in prompts])
    table = np.full((len(prompts), lengths.max()), -1)
    for row, prompt in zip(table, prompts, strict=True):
        row[: len(prompt)] = prompt
    ends = np.minimum(lengths[:-1], lengths[1:]) - 1
    differs = table[:-1] != table[1:]
    # Where all tokens are equal no place differs.
    differs[np.arange(len(ends)), ends] = True
    common: list[int] = differs.argmax(1).tolist()
    return common


def _best_groups(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """The runs of neighbours (first, end, tokens in common) that save most tokens together.

    common: what each has in common with the next. Runs lie in each other like a tree, one for each number of tokens in
    common. A run is taken where it saves more than the best runs within it.
    """
    # Runs that are still open, the outer ones first.
    open_runs = [_Run(0, 0)]
    for last, length in enumerate([*(length if length >= _SMALLEST_PREFIX else 0 for length in common), 0]):
        first, saved, groups = last, 0, list[tuple[int, int, int]]()
        while open_runs[-1].length > length:
            run = open_runs.pop()
            run.hold(saved, groups)
            first, saved, groups = run.first, run.saved, run.groups
            if (own := run.length * (last - first)) >= max(saved, _SMALLEST_SAVING):
                saved, groups = own, [(first, last + 1, run.length)]
        if open_runs[-1].length < length:
            open_runs.append(_Run(length, first))
        open_runs[-1].hold(saved, groups)
    return open_runs[0].groups


class _Run:
    """Neighbours from `first` on that have `length` tokens in common; the best groups within it, and what they save."""

    def __init__(self, length: int, first: int) -> None:
        self.length, self.first, self.saved = length, first, 0
        self.groups: list[tuple[int, int, int]] = []

    def hold(self, saved: int, groups: list[tuple[int, int, int]]) -> None:
        self.saved += saved
        self.groups += groups
