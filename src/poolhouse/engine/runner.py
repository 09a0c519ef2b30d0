"""Runner: one batch through the backbone and the pipelines, and out to the futures."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poolhouse.engine.observing import BatchRun, Observer, waits
from poolhouse.engine.queue import Arrival, WaitingRequest, cost_of
from poolhouse.engine.request import Answer, Timing, fail, start
from poolhouse.errors import EngineError, NonFiniteResult, NoStep, PoolhouseError
from poolhouse.models.model import Model
from poolhouse.outputs import Array
from poolhouse.packing.pack import Batch, PackedMarks, Read, Segments
from poolhouse.packing.prefixes import SharedPack
from poolhouse.packing.tokens import ShortTexts
from poolhouse.params import PoolingParams
from poolhouse.pooling.pipeline import Pipeline, Place
from poolhouse.pooling.rows import Rows
from poolhouse.tasks import TOKEN_TASKS, Task

log = logging.getLogger("poolhouse")

# Numbers that token tasks compute at once: a vocabulary per token takes gigabytes, and every step as much again.
_MAX_NUMBERS = 2**27


class FatalDeviceError(EngineError):
    """The device will not answer again in this process."""


@dataclass(slots=True, eq=False)
class Launched:
    """A batch whose work is under way on the device.

    pooled: each group's rows on the host. done: when the device is. pictures: how many it showed. started: by `time.perf_counter`.
    stopwatch: before the backbone, after it, and after the pipelines, where somebody observes.
    saved: tokens that did not run, since prompts shared them.
    """

    requests: list[WaitingRequest]
    pooled: list[tuple[Group, Rows]]
    done: torch.cuda.Event | None
    pictures: int = 0
    started: float = 0.0
    stopwatch: Stopwatch | None = None
    saved: int = 0


class Runner:
    """Runs batches of one model; budget: tokens of one batch, for the observer.

    prefix_sharing: whether a beginning that several prompts have runs once for all of them, where the model can.
    asynchronous: `launch` returns before the device is done, so the next batch can be prepared meanwhile.
    """

    def __init__(self, model: Model, budget: int, prefix_sharing: bool = True) -> None:
        self.model = model
        self._longest_shared = model.facts.longest_shared if prefix_sharing else 0
        self.budget = budget
        self.device = model.facts.device
        self.asynchronous = self.device.type == "cuda"
        self.observer: Observer | None = None

    def launch(self, requests: Sequence[WaitingRequest]) -> Launched | None:
        """Start a batch; cancelled requests leave it here. None if nothing is left or all of it failed.

        Raises:
            FatalDeviceError: the device is lost.
        """
        alive = [request for request in requests if start(request.future)]
        return self._launch(alive) if alive else None

    def finish(self, launched: Launched) -> None:
        """Wait for the device and resolve the futures."""
        try:
            if launched.done is not None:
                launched.done.synchronize()
            self._resolve(launched, time.perf_counter())
            self._report(launched)
        except Exception as error:  # noqa: BLE001 - whatever it is, callers must get it
            self._retry(launched.requests, error)

    @torch.inference_mode()
    def look_up(self, texts: ShortTexts, params: PoolingParams, arrival: Arrival) -> Array | None:
        """The vector of each text, [texts, features], of a model that is a table; None where one is not finite."""
        started = time.perf_counter()
        segments, ids = Segments(texts.lengths), torch.from_numpy(texts.ids)
        # A table reads no positions.
        hidden = self.model.backbone(Batch(ids, torch.zeros_like(ids), segments))
        looked_up = time.perf_counter()
        vectors = self.model.pipelines["embed"](Rows(hidden, segments, ids), params).owned_by_numpy()
        if not np.isfinite(vectors).all():
            return None
        if self.observer is not None:
            count, tokens, pooled = len(texts.lengths), len(ids), time.perf_counter()
            waited = ((arrival.waited(started), count),)
            times = looked_up - started, pooled - looked_up
            self.observer.ran(BatchRun(count, tokens, self.budget, waited, *times, computed=tokens))
        return vectors

    @torch.inference_mode()
    def _launch(self, requests: list[WaitingRequest]) -> Launched | None:
        started = time.perf_counter()
        stopwatch = None if self.observer is None else Stopwatch(self.device)
        try:
            if any(request.adapter for request in requests):
                # The rows of each adapter lie together.
                requests = sorted(requests, key=lambda request: request.adapter or "")
            batch, shared = self._packed(requests)
            place = self._place(requests)
            if place is not None:
                batch = replace(batch, read=_read(place, requests, batch, shared))
            _mark(stopwatch)
            hidden = self.model.backbone(batch)
            _mark(stopwatch)
            passed = Passed.of(batch, shared, hidden)
            # What is shared lies together anew for each group, and takes memory.
            groups = groups_of(requests, self.model.pipelines, hidden.shape[1] if passed.rows is not None else 1)
            pooled = [(group, self._pool(group, passed)) for group in groups]
            _mark(stopwatch)
            done = None
            if self.asynchronous:
                done = torch.cuda.Event()
                done.record()
            shown = 0 if batch.pictures is None else len(batch.pictures.pictures)
            saved = 0 if shared is None else shared.saved
            return Launched(requests, pooled, done, shown, started, stopwatch, saved)
        except Exception as error:  # noqa: BLE001 - whatever it is, callers must get it
            self._retry(requests, error)
            return None

    def _packed(self, requests: Sequence[WaitingRequest]) -> tuple[Batch, SharedPack | None]:
        """What runs, and where its rows belong where prompts share some."""
        prompts = [request.tokens for request in requests]
        adapters = [request.adapter for request in requests]
        shared = None
        if self._longest_shared and len(requests) > 1:
            shared = SharedPack.of(prompts, self.device, adapters, self._longest_shared)
        return (Batch.pack(prompts, self.device, adapters), None) if shared is None else (shared.batch, shared)

    def _place(self, requests: Sequence[WaitingRequest]) -> Place | None:
        """Where the only row of each prompt stands that is read; None where more are, or the model answers with all."""
        if not self.model.facts.picks or any(request.spans is not None for request in requests):
            return None
        asked = {(request.task, request.route) for request in requests}
        asked |= {(task, request.route) for request in requests for task, _ in request.further}
        places = {self._pipeline(task, route).place for task, route in asked}
        return places.pop() if len(places) == 1 else None

    def _pipeline(self, task: Task, route: str | None) -> Pipeline:
        return self.model.pipelines[task] if route is None else self.model.pipeline(task, route)

    def _pool(self, group: Group, passed: Passed) -> Rows:
        task = group.task
        pipeline, rows = self._pipeline(task, group.route), passed.rows_of(group)
        pooled = (pipeline.of_spans(task) if group.of_spans else pipeline)(rows, group.params)
        values = pooled.values.to("cpu", non_blocking=True) if self.asynchronous else pooled.values.cpu()
        segments = pooled.segments
        if group.of_spans:
            segments = Segments([len(request.spans) for request in group.requests if request.spans is not None])
        return Rows(values, segments, pooled.ids)

    def _resolve(self, launched: Launched, finished: float) -> None:
        timings: dict[Arrival, Timing] = {}
        parts: dict[WaitingRequest, dict[Task, Array]] = {}
        for group, rows in launched.pooled:
            for request, array in zip(group.requests, self._arrays(group, rows), strict=True):
                if isinstance(array, PoolhouseError):
                    fail(request.future, array)
                    continue
                timing = timings.get(request.arrival)
                if timing is None:
                    timing = timings[request.arrival] = request.arrival.timing(launched.started, finished)
                if not request.further:
                    request.future.set_result(Answer(array, request.tokens.answered, timing=timing))
                    continue
                arrays = parts.setdefault(request, {})
                arrays[group.task] = array
                if len(arrays) == 1 + len(request.further):
                    first = arrays.pop(request.task)
                    request.future.set_result(Answer(first, request.tokens.answered, further=arrays, timing=timing))

    def _arrays(self, group: Group, rows: Rows) -> Iterator[Array | PoolhouseError]:
        """The answer of each request to the group's task, or what is wrong with it."""
        values = rows.owned_by_numpy()
        finite: npt.NDArray[np.bool_] = np.isfinite(values)
        all_finite = bool(finite.all())
        several = group.task in TOKEN_TASKS or group.of_spans or group.of_labels
        for request, begin, end in zip(group.requests, rows.segments.starts, rows.segments.ends, strict=True):
            if not all_finite and not finite[begin:end].all():
                yield NonFiniteResult(
                    f"The model's answer holds NaN or infinity (dtype {self.model.facts.dtype}). "
                    "Try dtype='float32' or dtype='bfloat16'."
                )
            elif several and begin == end and not self._may_be_empty(request, group.task):
                yield NoStep()
            else:
                yield values[begin:end] if several else values[begin]

    def _may_be_empty(self, request: WaitingRequest, task: Task) -> bool:
        """Whether no row is an answer: all tokens are skipped, or none has a weight. Of process rewards it is a missing step."""
        tokens = request.tokens
        may_be = (
            request.is_chunk or tokens.kept is not None or tokens.marks is not None or self.model.facts.takes_nothing
        )
        return may_be or self.model.pipelines[task].sparse is not None

    def _report(self, launched: Launched) -> None:
        """Tell the observer of a batch that the device is done with."""
        if self.observer is None or launched.stopwatch is None:
            return
        requests = launched.requests
        tokens = sum(map(cost_of, requests))
        forward_seconds, pooling_seconds = launched.stopwatch.seconds()
        self.observer.ran(
            BatchRun(
                len(requests),
                tokens,
                self.budget,
                waits((request.arrival for request in requests), launched.started),
                forward_seconds,
                pooling_seconds,
                launched.pictures,
                tokens - launched.saved,
            )
        )

    def _retry(self, requests: list[WaitingRequest], error: Exception) -> None:
        """Run the halves of a failed batch by themselves, so that a failing item fails alone."""
        if isinstance(error, torch.AcceleratorError):
            for request in requests:
                _fail(request, error)
            raise FatalDeviceError(f"The device failed: {error}") from error
        waiting = [request for request in requests if not request.future.done()]
        if len(waiting) == 1:
            log.error("A request failed in the model: %s", error, exc_info=error)
            _fail(waiting[0], error)
            return
        middle = len(waiting) // 2
        for half in (waiting[:middle], waiting[middle:]):
            launched = self._launch(half) if half else None
            if launched is not None:
                self.finish(launched)


def _fail(request: WaitingRequest, error: Exception) -> None:
    failure = error if isinstance(error, EngineError) else EngineError(f"The model failed on this input: {error}")
    failure.__cause__ = error if failure is not error else None
    fail(request.future, failure)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Requests of a batch that are pooled in one call, since their task and its parameters are equal.

    of_spans: spans of their tokens are pooled, not the whole. of_labels: they hold labels, and an answer has as many rows
    as labels, or as were found. route: their way, of a model that has several. indexes: of these requests in the batch.
    """

    task: Task
    params: PoolingParams
    of_spans: bool
    of_labels: bool
    route: str | None
    indexes: list[int]
    requests: list[WaitingRequest]


def groups_of(requests: Sequence[WaitingRequest], pipelines: Mapping[Task, Pipeline], width: int = 1) -> list[Group]:
    """The groups of a batch, none of too many numbers; usually one. A request is in one for each of its tasks.

    width: numbers that a row takes before its pipeline.
    """
    alike: dict[tuple[Task, PoolingParams, bool, bool, str | None], list[int]] = {}
    for index, request in enumerate(requests):
        kind = request.spans is not None, request.tokens.marks is not None, request.route
        alike.setdefault((request.task, request.params, *kind), []).append(index)
        for task, params in request.further:
            alike.setdefault((task, params, *kind), []).append(index)
    groups: list[Group] = []
    for (task, params, of_spans, of_labels, route), members in alike.items():
        widest = max(width, pipelines[task].width) if task in TOKEN_TASKS else width
        groups.extend(
            Group(task, params, of_spans, of_labels, route, indexes, [requests[index] for index in indexes])
            for indexes in _slices_of(members, requests, _MAX_NUMBERS // widest)
        )
    return groups


def _slices_of(members: list[int], requests: Sequence[WaitingRequest], max_rows: int) -> list[list[int]]:
    """Members in order, in slices of at most so many rows; one longer request goes alone."""
    slices: list[list[int]] = []
    room = 0
    for index in members:
        if not slices or requests[index].length > room:
            slices.append([])
            room = max_rows
        slices[-1].append(index)
        room -= requests[index].length
    return slices


def _read(place: Place, requests: Sequence[WaitingRequest], batch: Batch, shared: SharedPack | None) -> Read:
    segments = batch.segments if shared is None else shared.segments
    rows = segments.starts_tensor if place == "first" else segments.last_tensor
    one_each = Segments((1,) * len(rows), segments.device, adapters=[request.adapter for request in requests])
    return Read(rows if shared is None else shared.rows[rows], one_each)


@dataclass(frozen=True, slots=True, eq=False)
class Passed:
    """A batch after its pass through the backbone.

    hidden: [rows that ran, features]. segments, ids: of its prompts, each whole. rows: [total], which row of hidden each
    of their tokens has; None where they lie there in order. Where one row of each prompt is read, all is of these.
    """

    hidden: Tensor
    segments: Segments
    ids: Tensor
    rows: Tensor | None = None
    one_each: bool = False

    @classmethod
    def of(cls, batch: Batch, shared: SharedPack | None, hidden: Tensor) -> Passed:
        if batch.read is not None:
            return cls(hidden, batch.read.segments, batch.ids[batch.read.rows], one_each=True)
        if shared is None:
            return cls(hidden, batch.segments, batch.ids)
        return cls(hidden, shared.segments, shared.ids, shared.rows)

    def rows_of(self, group: Group) -> Rows:
        """The rows of a group's requests."""
        starts, ends = self.segments.starts, self.segments.ends
        if group.of_spans:
            # The rows of every span, as if each were a sequence of its own.
            spans = [
                request.spans + starts[index]
                for index, request in zip(group.indexes, group.requests, strict=True)
                if request.spans is not None
            ]
            bounds = np.concatenate(spans).tolist()
            owners = [request.adapter for request in group.requests for _ in request.spans]  # type: ignore[union-attr]
            return self._slices(bounds, owners)
        # What a row that counts alone is read by leaves out no others.
        skip, kept = (None, None) if self.one_each else (_skip(group.requests), _kept(group.requests, self.ids.device))
        if len(group.indexes) == len(self.segments):
            values = self.hidden if self.rows is None else self.hidden[self.rows]
            rows = Rows(values, self.segments, self.ids, skip, kept)
        else:
            bounds = [(starts[index], ends[index]) for index in group.indexes]
            rows = self._slices(bounds, [request.adapter for request in group.requests], skip, kept)
        return replace(rows, marks=_marks(group.requests, rows.segments)) if group.of_labels else rows

    def _slices(
        self,
        bounds: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        skip: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Rows:
        def taken(x: Tensor) -> Tensor:
            return torch.cat([x[start:end] for start, end in bounds])

        return Rows(
            taken(self.hidden) if self.rows is None else self.hidden[taken(self.rows)],
            Segments([end - start for start, end in bounds], self.segments.device, adapters=adapters),
            taken(self.ids),
            skip,
            kept,
        )


def _skip(requests: list[WaitingRequest]) -> Tensor | None:
    if not any(request.tokens.skip for request in requests):
        return None
    return torch.tensor([request.tokens.skip for request in requests])


def _kept(requests: list[WaitingRequest], device: torch.device) -> Tensor | None:
    """The rows that token tasks answer with, [rows of these requests]; None where these are all."""
    if all(request.tokens.kept is None for request in requests):
        return None
    kept = [np.ones(request.length, bool) if (own := request.tokens.kept) is None else own for request in requests]
    return torch.from_numpy(np.concatenate(kept)).to(device, non_blocking=True)


def _marks(requests: list[WaitingRequest], segments: Segments) -> PackedMarks:
    """Where labels and words of these requests stand in their rows."""
    marks = [own for request in requests if (own := request.tokens.marks) is not None]
    return PackedMarks.of(marks, segments.starts, segments.device)


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


def _mark(stopwatch: Stopwatch | None) -> None:
    if stopwatch is not None:
        stopwatch.mark()
