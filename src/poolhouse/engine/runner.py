"""Runner: one batch through the backbone and the pipelines, and out to the futures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poolhouse.batch import Batch
from poolhouse.engine.request import Answer
from poolhouse.engine.scheduler import Ready
from poolhouse.errors import EngineError, NonFiniteResult, NoStep
from poolhouse.models.model import Model
from poolhouse.outputs import Array
from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import Rows
from poolhouse.segments import Segments
from poolhouse.tasks import TOKEN_TASKS, Task

log = logging.getLogger("poolhouse")

# Numbers that token tasks compute at once: a vocabulary per token takes gigabytes, and every step as much again.
_MOST_NUMBERS = 2**27


@dataclass(slots=True, eq=False)
class Launched:
    """A batch whose work is under way on the device: requests of one (task, params), their rows, and when done."""

    requests: list[Ready]
    groups: list[tuple[list[Ready], Rows]]
    done: torch.cuda.Event | None


class FatalDeviceError(EngineError):
    """The device will not answer again in this process."""


class Runner:
    """Runs batches of one model.

    asynchronous: `launch` returns before the device is done, so the next batch can be prepared meanwhile.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = model.facts.device
        self.asynchronous = self.device.type == "cuda"

    def launch(self, requests: Sequence[Ready]) -> Launched | None:
        """Start a batch; cancelled requests leave it here. None if nothing is left or all of it failed.

        Raises:
            FatalDeviceError: the device is lost.
        """
        alive = [request for request in requests if request.future.set_running_or_notify_cancel()]
        return self._launch(alive) if alive else None

    def finish(self, launched: Launched) -> None:
        """Wait for the device and resolve the futures."""
        try:
            if launched.done is not None:
                launched.done.synchronize()
            for requests, rows in launched.groups:
                self._resolve(requests, rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, callers must hear of it
            self._retry(launched.requests, error)

    @torch.inference_mode()
    def _launch(self, requests: list[Ready]) -> Launched | None:
        try:
            if any(request.adapter for request in requests):
                # Each adapter owns one span of rows.
                requests = sorted(requests, key=lambda request: request.adapter or "")
            batch = Batch.pack(
                [request.tokens for request in requests], self.device, [request.adapter for request in requests]
            )
            hidden = self.model.backbone(batch)
            parts = self._parts(requests)
            groups = [(members, self._pool(members, rows)) for members, rows in _groups(parts, requests, batch, hidden)]
            done = None
            if self.asynchronous:
                done = torch.cuda.Event()
                done.record()
            return Launched(requests, groups, done)
        except Exception as error:  # noqa: BLE001 - whatever it is, callers must hear of it
            self._retry(requests, error)
            return None

    def _parts(self, requests: list[Ready]) -> list[list[int]]:
        """Requests that can be pooled together: of one task and params, and of not too many numbers; usually one part."""
        by_kind: dict[tuple[Task, PoolingParams, bool], list[int]] = {}
        for index, request in enumerate(requests):
            by_kind.setdefault((request.task, request.params, request.spans is not None), []).append(index)
        parts: list[list[int]] = []
        for (task, _, _), members in by_kind.items():
            width = self.model.pipelines[task].width if task in TOKEN_TASKS else 1
            parts.extend(_slices_of(members, requests, _MOST_NUMBERS // width))
        return parts

    def _pool(self, requests: list[Ready], rows: Rows) -> Rows:
        pipeline = self.model.pipelines[requests[0].task]
        counts = [len(request.spans) for request in requests if request.spans is not None]
        pooled = (pipeline.of_spans() if counts else pipeline)(rows, requests[0].params)
        values = pooled.values.to("cpu", non_blocking=self.asynchronous)
        return Rows(values, Segments(counts) if counts else pooled.segments, pooled.ids)

    def _resolve(self, requests: list[Ready], rows: Rows) -> None:
        values: Array = rows.values.numpy()
        finite: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(values), axis=1)
        several = requests[0].task in TOKEN_TASKS or requests[0].spans is not None
        starts, ends = rows.segments.starts, rows.segments.ends
        all_finite = bool(finite.all())
        for index, request in enumerate(requests):
            start, end = starts[index], ends[index]
            if not all_finite and not finite[start:end].all():
                request.future.set_exception(
                    NonFiniteResult(
                        f"The model's answer holds NaN or infinity (dtype {self.model.facts.dtype}). "
                        "Try dtype='float32' or dtype='bfloat16'."
                    )
                )
                continue
            # A text of skipped tokens alone has no vectors, which is an answer too.
            if several and start == end and not request.part and request.tokens.kept is None:
                request.future.set_exception(NoStep())
                continue
            request.future.set_result(Answer(values[start:end] if several else values[start], request.tokens))

    def _retry(self, requests: list[Ready], error: Exception) -> None:
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


def _fail(request: Ready, error: Exception) -> None:
    if not request.future.done():
        failure = error if isinstance(error, EngineError) else EngineError(f"The model failed on this input: {error}")
        failure.__cause__ = error if failure is not error else None
        request.future.set_exception(failure)


def _groups(
    parts: list[list[int]], requests: list[Ready], batch: Batch, hidden: Tensor
) -> Iterator[tuple[list[Ready], Rows]]:
    """The requests of each part, with rows of their own. parts: places in the pack."""
    for members in parts:
        chosen = [requests[index] for index in members]
        if chosen[0].spans is not None:
            rows = _rows_of_spans([(batch.segments.starts[index], requests[index]) for index in members], batch, hidden)
        elif len(parts) == 1:
            rows = Rows(hidden, batch.segments, batch.ids, _skip(requests), _kept(requests, batch))
        else:
            rows = replace(_rows(members, batch, hidden, _skip(chosen)), kept=_kept(chosen, batch))
        yield chosen, rows


def _slices_of(members: list[int], requests: list[Ready], most_rows: int) -> list[list[int]]:
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


def _rows(members: list[int], batch: Batch, hidden: Tensor, skip: Tensor | None) -> Rows:
    """The rows of some sequences of a pack."""
    bounds = [(batch.segments.starts[index], batch.segments.ends[index]) for index in members]
    return _slices(bounds, batch, hidden, skip)


def _rows_of_spans(members: list[tuple[int, Ready]], batch: Batch, hidden: Tensor) -> Rows:
    """The rows of every span, as if each were a sequence of its own. members: first row of each request, and it."""
    spans = np.concatenate([request.spans + first for first, request in members if request.spans is not None])
    return _slices(spans.tolist(), batch, hidden, None)


def _slices(bounds: Sequence[Sequence[int]], batch: Batch, hidden: Tensor, skip: Tensor | None) -> Rows:
    return Rows(
        torch.cat([hidden[start:end] for start, end in bounds]),
        Segments([end - start for start, end in bounds], batch.segments.device),
        torch.cat([batch.ids[start:end] for start, end in bounds]),
        skip,
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
