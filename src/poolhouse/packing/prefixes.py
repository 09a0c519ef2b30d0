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

from poolhouse.packing.pack import NO_PREFIX, Batch, Prefix, Segments, on_device
from poolhouse.packing.tokens import Ids, Tokens

# A shorter beginning, or one that saves fewer tokens, costs more in calls of attention than it saves.
SMALLEST_PREFIX = 8
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
        if any(prompt.pictures is not None for prompt in prompts):
            # Rows of pictures and positions of three axes are counted over whole prompts.
            return None
        beginnings = shared_beginnings(prompts, adapters or (None,) * len(prompts), max_tokens)
        if not beginnings:
            return None
        pieces = _Pieces(prompts)
        shared = {beginning.members[0]: beginning for beginning in beginnings}
        behind = {number for beginning in beginnings for number in beginning.members[1:]}
        for number in range(len(prompts)):
            if number in shared:
                pieces.lay_together(*shared[number])
            elif number not in behind:
                pieces.lay(number)
        owners = None if adapters is None else [adapters[number] for number in pieces.numbers]
        return cls(
            Batch.pack(pieces.tokens, device, owners, pieces.prefixes),
            Segments([len(prompt) for prompt in prompts], device, adapters=adapters),
            on_device(np.concatenate([prompt.ids for prompt in prompts]), device),
            on_device(np.concatenate([part for parts in pieces.rows for part in parts]), device),
        )

    @property
    def saved(self) -> int:
        """Tokens that do not run again."""
        return self.segments.total - self.batch.segments.total


class _Pieces:
    """What lies in a pack: whole prompts, beginnings, and rests behind them.

    tokens, prefixes: of each piece. numbers: the prompt that it is of, or the first of those. rows: where those of each
    prompt lie, in order.
    """

    def __init__(self, prompts: Sequence[Tokens]) -> None:
        self.tokens: list[Tokens] = []
        self.prefixes: list[Prefix] = []
        self.numbers: list[int] = []
        self.rows: list[list[Ids]] = [[] for _ in prompts]
        self._prompts = prompts
        self._total = 0

    def lay(self, number: int) -> None:
        """A whole prompt."""
        self.rows[number].append(self._lay(self._prompts[number], NO_PREFIX, number))

    def lay_together(self, members: Sequence[int], length: int) -> None:
        """The first tokens of these prompts once, then the rest of each."""
        prefix = Prefix(self._total, length)
        common = self._lay(Tokens(self._prompts[members[0]].ids[:length]), NO_PREFIX, members[0])
        for number in members:
            self.rows[number] += common, self._lay(Tokens(self._prompts[number].ids[length:]), prefix, number)

    def _lay(self, piece: Tokens, prefix: Prefix, number: int) -> Ids:
        self.tokens.append(piece)
        self.prefixes.append(prefix)
        self.numbers.append(number)
        self._total += len(piece)
        return np.arange(self._total - len(piece), self._total)


def shared_beginnings(
    prompts: Sequence[Tokens], adapters: Sequence[str | None], max_tokens: int | None = None
) -> list[Beginning]:
    """The beginnings that prompts of one adapter may share and that are worth it; max_tokens: of one that may."""
    by_adapter: dict[str | None, list[int]] = {}
    for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        plain = prompt.types is None and prompt.attended is None and prompt.pictures is None
        if plain and (max_tokens is None or len(prompt) <= max_tokens):
            by_adapter.setdefault(adapter, []).append(number)
    ids = [prompt.ids for prompt in prompts]
    return [beginning for numbers in by_adapter.values() for beginning in common_beginnings(ids, numbers)]


def common_beginnings(prompts: Sequence[Ids], numbers: Sequence[int]) -> list[Beginning]:
    """The beginnings that are worth sharing among those of these numbers; no prompt is in two, and each keeps a rest."""
    alike: dict[bytes, list[int]] = {}
    for number in numbers:
        if len(prompts[number]) > SMALLEST_PREFIX:
            alike.setdefault(prompts[number][:SMALLEST_PREFIX].tobytes(), []).append(number)
    found: list[Beginning] = []
    for members in alike.values():
        if len(members) < 2:
            continue
        # In this order what two prompts have in common, all between them have too.
        members.sort(key=lambda number: prompts[number].tobytes())
        for first, end, length in _best_groups(_in_common([prompts[number] for number in members])):
            found.append(Beginning(tuple(sorted(members[first:end])), length))
    return found


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
    for last, length in enumerate([*(length if length >= SMALLEST_PREFIX else 0 for length in common), 0]):
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
