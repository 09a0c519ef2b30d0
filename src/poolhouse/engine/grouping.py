"""Grouping: the requests of a pack that are pooled together, and the rows that they are pooled from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from poolhouse.batch import Batch
from poolhouse.engine.ready import Ready
from poolhouse.params import PoolingParams
from poolhouse.pooling.pipelines import Pipeline
from poolhouse.pooling.rows import Rows
from poolhouse.segments import Segments
from poolhouse.tasks import TOKEN_TASKS, Task

# Numbers that token tasks compute at once: a vocabulary per token takes gigabytes, and every step as much again.
_MOST_NUMBERS = 2**27


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """What is pooled in one call: one task with its parameters; members: places of its requests in the pack.

    route: the way of these requests, of a model that has several.
    """

    task: Task
    params: PoolingParams
    members: list[int]
    of_spans: bool
    route: str | None = None


def groups_of(requests: Sequence[Ready], pipelines: Mapping[Task, Pipeline]) -> list[Group]:
    """Groups of one task, params and route, and of not too many numbers; usually one. A request is in one for each of its tasks."""
    by_kind: dict[tuple[Task, PoolingParams, bool, str | None], list[int]] = {}
    for index, request in enumerate(requests):
        of_spans = request.spans is not None
        by_kind.setdefault((request.task, request.params, of_spans, request.route), []).append(index)
        for task, params in request.further:
            by_kind.setdefault((task, params, of_spans, request.route), []).append(index)
    groups: list[Group] = []
    for (task, params, of_spans, route), members in by_kind.items():
        width = pipelines[task].width if task in TOKEN_TASKS else 1
        slices = _slices_of(members, requests, _MOST_NUMBERS // width)
        groups.extend(Group(task, params, members, of_spans, route) for members in slices)
    return groups


def rows_of(group: Group, requests: Sequence[Ready], batch: Batch, hidden: Tensor) -> Rows:
    """The rows of a group's requests. hidden: [tokens, features] of the whole pack."""
    chosen = [requests[index] for index in group.members]
    if group.of_spans:
        firsts = [batch.segments.starts[index] for index in group.members]
        return _rows_of_spans(list(zip(firsts, chosen, strict=True)), batch, hidden)
    if len(chosen) == len(requests):
        return Rows(hidden, batch.segments, batch.ids, _skip(chosen), _kept(chosen, batch))
    bounds = [(batch.segments.starts[index], batch.segments.ends[index]) for index in group.members]
    return _slices(bounds, batch, hidden, _skip(chosen), _kept(chosen, batch))


def _slices_of(members: list[int], requests: Sequence[Ready], most_rows: int) -> list[list[int]]:
    """Members in order, in slices of at most so many rows; one longer request goes alone."""
    slices: list[list[int]] = []
    room = 0
    for index in members:
        if not slices or requests[index].length > room:
            slices.append([])
            room = most_rows
        slices[-1].append(index)
        room -= requests[index].length
    return slices


def _rows_of_spans(members: list[tuple[int, Ready]], batch: Batch, hidden: Tensor) -> Rows:
    """The rows of every span, as if each were a sequence of its own. members: first row of each request, and it."""
    spans = np.concatenate([request.spans + first for first, request in members if request.spans is not None])
    return _slices(spans.tolist(), batch, hidden, None, None)


def _slices(
    bounds: Sequence[Sequence[int]], batch: Batch, hidden: Tensor, skip: Tensor | None, kept: Tensor | None
) -> Rows:
    return Rows(
        torch.cat([hidden[start:end] for start, end in bounds]),
        Segments([end - start for start, end in bounds], batch.segments.device),
        torch.cat([batch.ids[start:end] for start, end in bounds]),
        skip,
        kept,
    )


def _skip(requests: list[Ready]) -> Tensor | None:
    if not any(request.tokens.skip for request in requests):
        return None
    return torch.tensor([request.tokens.skip for request in requests])


def _kept(requests: list[Ready], batch: Batch) -> Tensor | None:
    """The rows that token tasks answer with, [rows of these requests]; None where these are all."""
    if all(request.tokens.kept is None for request in requests):
        return None
    kept = [np.ones(request.length, bool) if (own := request.tokens.kept) is None else own for request in requests]
    return torch.from_numpy(np.concatenate(kept)).to(batch.ids.device, non_blocking=True)
