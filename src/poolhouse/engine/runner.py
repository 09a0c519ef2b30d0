"""Runner: one batch through the backbone and the pipelines, and out to the futures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poolhouse.batch import Batch
from poolhouse.engine.request import Answer
from poolhouse.engine.scheduler import Ready
from poolhouse.errors import EngineError, InvalidRequest, NonFiniteResult
from poolhouse.models.model import Model
from poolhouse.outputs import Array
from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import Rows
from poolhouse.segments import Segments
from poolhouse.tasks import TOKEN_TASKS, Task

log = logging.getLogger("poolhouse")


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
            batch = Batch.pack([request.tokens for request in requests], self.device)
            hidden = self.model.backbone(batch)
            groups = [(members, self._pool(members, rows)) for members, rows in _groups(requests, batch, hidden)]
            done = None
            if self.asynchronous:
                done = torch.cuda.Event()
                done.record()
            return Launched(requests, groups, done)
        except Exception as error:  # noqa: BLE001 - whatever it is, callers must hear of it
            self._retry(requests, error)
            return None

    def _pool(self, requests: list[Ready], rows: Rows) -> Rows:
        pooled = self.model.pipelines[requests[0].task](rows, requests[0].params)
        values = pooled.values.to("cpu", non_blocking=self.asynchronous)
        return Rows(values, pooled.segments, pooled.ids)

    def _resolve(self, requests: list[Ready], rows: Rows) -> None:
        values: Array = rows.values.numpy()
        finite: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(values), axis=1)
        token_task = requests[0].task in TOKEN_TASKS
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
            if token_task and start == end:
                request.future.set_exception(
                    InvalidRequest(
                        "The prompt holds no step tag (step_tag_id), or other token that the model answers at, so there is no row.",
                        "prompt",
                    )
                )
                continue
            request.future.set_result(Answer(values[start:end] if token_task else values[start], request.tokens))

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


def _groups(requests: list[Ready], batch: Batch, hidden: Tensor) -> list[tuple[list[Ready], Rows]]:
    """Requests that share task and params, each group with its own rows; usually there is one group."""
    by_kind: dict[tuple[Task, PoolingParams], list[int]] = {}
    for index, request in enumerate(requests):
        by_kind.setdefault((request.task, request.params), []).append(index)
    if len(by_kind) == 1:
        return [(requests, Rows(hidden, batch.segments, batch.ids, _skip(requests)))]
    groups = []
    starts, ends = batch.segments.starts, batch.segments.ends
    for members in by_kind.values():
        chosen = [requests[index] for index in members]
        rows = Rows(
            torch.cat([hidden[starts[index] : ends[index]] for index in members]),
            Segments([request.length for request in chosen], batch.segments.device),
            torch.cat([batch.ids[starts[index] : ends[index]] for index in members]),
            _skip(chosen),
        )
        groups.append((chosen, rows))
    return groups


def _skip(requests: list[Ready]) -> Tensor | None:
    if not any(request.tokens.skip for request in requests):
        return None
    return torch.tensor([request.tokens.skip for request in requests])
