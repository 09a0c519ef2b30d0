"""Test doubles: an engine without a model, for tests of what stands around engines."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from poolhouse.engine.request import Answer, Request
from poolhouse.errors import EngineClosed, InputTooLong, InvalidRequest
from poolhouse.inputs.chat import ScoreTemplate
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.listwise import ListwisePrompts
from poolhouse.outputs import Array
from poolhouse.params import Matryoshka, PoolingParams
from poolhouse.plugins import Plugin
from poolhouse.precision import Calibration
from poolhouse.tasks import TOKEN_TASKS, Task, parse_task
from poolhouse.tokens import Tokens


class FakeEngine:
    """An engine that makes its answers of the text alone, one request after the other.

    The same text always gets the same vector of unit length, another text another one. Words are its tokens.
    delay_seconds: time that each request takes. failure: what every request fails with.
    dimensions: the Matryoshka sizes it offers. label_names: of `classify`, whose answers are as wide. `received` holds every request it was given.
    Clear `open` to let requests wait until it is set again; set `alive` to False to let the engine be dead.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        tasks: tuple[Task, ...] = ("embed", "token_embed"),
        width: int = 8,
        max_tokens: int = 512,
        prompts: Mapping[str, str] | None = None,
        dimensions: tuple[int, ...] = (),
        label_names: Mapping[int, str] | None = None,
        calibration: Calibration | None = None,
        delay_seconds: float = 0.0,
        failure: Exception | None = None,
    ) -> None:
        self.name = name
        self.tasks = tasks
        self.width = width
        self.max_tokens = max_tokens
        self.prompts: Mapping[str, str] = prompts or {}
        self.aliases: tuple[str, ...] = ()
        self.token_weights = False
        self.adapters: tuple[str, ...] = ()
        self.label_names: Mapping[int, str] = label_names or {}
        self.labels = len(self.label_names)
        self.score_template: ScoreTemplate | None = None
        self.listwise: ListwisePrompts | None = None
        self.plugin: Plugin | None = None
        self.calibration = calibration
        self.matryoshka = Matryoshka(width, bool(dimensions), dimensions)
        self.delay_seconds = delay_seconds
        self.failure = failure
        self.alive = True
        self.open = threading.Event()
        self.open.set()
        self.received: list[Request] = []
        self._thread = ThreadPoolExecutor(1, "poolhouse-fake")

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]:
        """Start work on requests; each future gets its answer or its error."""
        self.received.extend(requests)
        for request in requests:
            if self.alive:
                self._thread.submit(self._work, request)
            else:
                request.future.set_exception(EngineClosed("The engine is shut down."))
        return [request.future for request in requests]

    def limit(self, params: PoolingParams) -> Limit:
        """How long a prompt may be."""
        return Limit(self.max_tokens, params.truncate_prompt_tokens, params.truncation_side)

    def close(self, drain_seconds: float = 30.0) -> None:
        """Answer what was accepted, then stop."""
        self.alive = False
        self.open.set()
        self._thread.shutdown()

    def _work(self, request: Request) -> None:
        self.open.wait()
        if not request.future.set_running_or_notify_cancel():
            return
        time.sleep(self.delay_seconds)
        try:
            if self.failure is not None:
                raise self.failure
            request.future.set_result(self._answer(request))
        except Exception as error:  # noqa: BLE001 - as an engine does: every failure is the future's
            request.future.set_exception(error)

    def _answer(self, request: Request) -> Answer:
        task = parse_task(request.task, self.tasks)
        request.params.check(task, self.matryoshka, self.name)
        tokens = self._tokens(request)
        width = self.labels if task == "classify" else request.params.dimensions or self.width
        if task in TOKEN_TASKS:
            return Answer(np.stack([_vector(int(token), width) for token in tokens.ids]), tokens)
        return Answer(_vector(zlib.crc32(tokens.ids.tobytes()), width), tokens)

    def _tokens(self, request: Request) -> Tokens:
        ids = request.prompt.ids
        if ids is None:
            if request.prompt_name and request.prompt_name not in self.prompts:
                raise InvalidRequest(f"The model has no prompt named '{request.prompt_name}'.", "prompt_name")
            prefix, pair = self.prompts.get(request.prompt_name or "", ""), request.prompt.pair
            text = prefix + (request.prompt.text or "") + ("" if pair is None else f" {pair}")
            ids = np.array([zlib.crc32(word.encode()) for word in text.split() or [""]], dtype=np.int64)
        keep = request.params.truncate_prompt_tokens
        if keep is None and len(ids) > self.max_tokens:
            raise InputTooLong(f"The limit is {self.max_tokens} tokens, got {len(ids)}.", "input_tokens", len(ids))
        kept = len(ids) if keep is None else self.max_tokens if keep == -1 else keep
        return Tokens(ids[:kept], original_tokens=len(ids))


def _vector(seed: int, width: int) -> Array:
    numbers = np.random.default_rng(seed).standard_normal(width, dtype=np.float32)
    unit: Array = numbers / np.linalg.norm(numbers)
    return unit
