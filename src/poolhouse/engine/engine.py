"""Engine: the one door. `submit` requests, wait for their futures.

Tokenizer threads make ids, the scheduler packs them, one device thread runs the batches.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from poolhouse.engine import chunks
from poolhouse.engine.options import EngineOptions
from poolhouse.engine.preparation import Preparation, Prepared
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.runner import Launched, Runner
from poolhouse.engine.scheduler import Ready, Scheduler
from poolhouse.errors import EngineClosed, EngineError, InvalidRequest
from poolhouse.inputs.chat import ScoreTemplate
from poolhouse.inputs.late_interaction import SideTokens
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.listwise import ListwisePrompts
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.models.model import Model
from poolhouse.params import PoolingParams
from poolhouse.plugins import Plugin
from poolhouse.tasks import Task
from poolhouse.tokens import Tokens

log = logging.getLogger("poolhouse")

# A lone text of up to this many characters is tokenised by its caller: quicker than waking a thread.
_INLINE_CHARACTERS = 2000
# Texts per tokenizer call: enough to share the work among cores, few enough to start computing early.
_TEXTS_PER_CALL = 128


class Engine:
    """One model, ready to answer from any thread."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, options: EngineOptions, plugin: Plugin | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.plugin = plugin
        self._preparation = Preparation(model, options)
        rules = model.facts.late_interaction
        self._sides = None if rules is None else SideTokens(rules, tokenizer, model.facts.max_tokens)
        self._scheduler = Scheduler(options.max_batch_tokens)
        self._runner = Runner(model)
        self._tokenizing = ThreadPoolExecutor(options.tokenizer_threads, "poolhouse-tokenizer")
        self._fatal: EngineError | None = None
        self._closed = False
        self._device = threading.Thread(target=self._work, name="poolhouse-device", daemon=True)
        self._device.start()
        # A thread inside torch while the interpreter is taken down aborts the process.
        atexit.register(self.close)

    @property
    def name(self) -> str:
        return self.model.facts.name

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names that requests may use."""
        return self.options.aliases

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.model.tasks

    @property
    def labels(self) -> int:
        """How many numbers `classify` answers with; 0 where the model does not classify."""
        pipeline = self.model.pipelines.get("classify")
        return 0 if pipeline is None else pipeline.width

    @property
    def label_names(self) -> Mapping[int, str]:
        return self.model.facts.labels

    @property
    def token_weights(self) -> bool:
        """Whether `token_classify` weighs tokens for sparse retrieval, as BGE-M3 does."""
        pipeline = self.model.pipelines.get("token_classify")
        return pipeline is not None and pipeline.weights

    @property
    def max_tokens(self) -> int:
        return self.model.facts.max_tokens

    @property
    def prompts(self) -> Mapping[str, str]:
        return self.model.facts.prompts

    @property
    def adapters(self) -> tuple[str, ...]:
        """Adapters that stand beside the model, each a model of its own to those who ask by name."""
        return () if self.model.adapters is None else self.model.adapters.declared

    @property
    def score_template(self) -> ScoreTemplate | None:
        return self.options.score_template

    @property
    def averages_max_sim(self) -> bool:
        """Whether a late-interaction score is a mean over the query's vectors, not a sum."""
        rules = self.model.facts.late_interaction
        return rules is not None and rules.mean

    @property
    def listwise(self) -> ListwisePrompts | None:
        """Makes the prompts of a model that scores all documents of a query together."""
        tokens = self.model.facts.listwise
        return None if tokens is None else ListwisePrompts(self.tokenizer, tokens.document_token, tokens.query_token)

    @property
    def alive(self) -> bool:
        """Whether requests can still be answered."""
        return not self._closed and self._fatal is None and self._device.is_alive()

    def limit(self, params: PoolingParams) -> Limit:
        """How long a prompt with these parameters may be."""
        return self._preparation.limit(params)

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]:
        """Start work on requests; each future gets its answer or its error.

        A request that cannot be answered fails alone, through its future. Cancel a future to leave the queue.
        """
        if len(requests) == 1 and _characters(requests[0].prompt) <= _INLINE_CHARACTERS:
            self._prepare(requests)
        else:
            for start in range(0, len(requests), _TEXTS_PER_CALL):
                part = requests[start : start + _TEXTS_PER_CALL]
                try:
                    self._tokenizing.submit(self._prepare, part)
                except RuntimeError:
                    _fail(part, EngineClosed("The engine is shut down."))
        return [request.future for request in requests]

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]:
        """The tokens of prompts, however long they are, without running them.

        Raises:
            InvalidRequest: for the first that has none.
        """
        prepared = [self._preparation.of(request) for request in requests]
        limits = [replace(made.limit, overflow="chunk", longest=None) for made in prepared]
        tokens = self.tokenizer.encode([made.prompt for made in prepared], limits)
        for result in tokens:
            if isinstance(result, InvalidRequest):
                raise result
        return [result for result in tokens if isinstance(result, Tokens)]

    def close(self, drain_seconds: float = 30.0) -> None:
        """Answer what was accepted, for at most `drain_seconds`, then stop; the rest fails with EngineClosed.

        May be called again to wait longer for the batch that is running.
        """
        self._closed = True
        atexit.unregister(self.close)
        stopper = threading.Thread(target=self._tokenizing.shutdown, name="poolhouse-stop", daemon=True)
        stopper.start()
        stopper.join(drain_seconds)
        self._scheduler.close()
        self._device.join(drain_seconds)
        for ready in self._scheduler.drop_all():
            _resolve_error(ready.future, EngineClosed("The engine was shut down before it could answer."))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, requests: Sequence[Request]) -> None:
        """Tokenise requests and let them wait for their batch."""
        try:
            self._tokenize(requests)
        except Exception as error:
            log.exception("Preparing %d requests failed", len(requests))
            _fail(requests, EngineError(f"Preparing the request failed: {error}"))

    def _tokenize(self, requests: Sequence[Request]) -> None:
        valid: list[tuple[Request, Prepared]] = []
        for request in requests:
            try:
                valid.append((request, self._preparation.of(request)))
            except InvalidRequest as error:
                _resolve_error(request.future, error)
        encoded = self._encoded([made for _, made in valid])
        ready: list[Ready] = []
        for (request, made), tokens in zip(valid, encoded, strict=True):
            if isinstance(tokens, Exception):
                _resolve_error(request.future, tokens)
            elif len(tokens) == 0:
                _resolve_error(request.future, InvalidRequest("The prompt has no tokens.", "prompt"))
            elif len(tokens) > self.max_tokens:
                ready.extend(chunks.pieces(request, made.params, tokens, self.max_tokens, made.adapter))
            else:
                ready.append(Ready(tokens, request.task, made.params, request.future, made.adapter, request.spans))
        if ready and not self._scheduler.add(ready):
            for item in ready:
                _resolve_error(item.future, self._fatal or EngineClosed("The engine is shut down."))

    def _encoded(self, prepared: Sequence[Prepared]) -> list[Tokens | InvalidRequest]:
        """The tokens of each, or its error."""
        prompts, limits, sides = [made.prompt for made in prepared], [made.limit for made in prepared], self._sides
        if sides is None:
            return self.tokenizer.encode(prompts, limits)
        limits = [made.limit if made.side is None else sides.limit(made.limit, made.side) for made in prepared]
        return [
            sides.finished(tokens, made.side, made.limit.add_special_tokens)
            if made.side is not None and isinstance(tokens, Tokens)
            else tokens
            for made, tokens in zip(prepared, self.tokenizer.encode(prompts, limits), strict=True)
        ]

    def _work(self) -> None:
        """The device thread: run batches until closed; on a device that can, keep one batch in flight."""
        runner, scheduler = self._runner, self._scheduler
        flying: Launched | None = None
        batch: list[Ready] | None = None
        try:
            while True:
                batch = scheduler.next(block=flying is None)
                if batch is None and flying is None:
                    return
                launched = runner.launch(batch) if batch else None
                if not runner.asynchronous:
                    flying, launched = launched, None
                if flying is not None:
                    runner.finish(flying)
                flying = launched
        except BaseException as error:
            self._fatal = error if isinstance(error, EngineError) else EngineError(f"The engine failed: {error!r}")
            scheduler.close()
            log.critical("The engine cannot go on: %s", error, exc_info=error)
            for ready in [*(flying.requests if flying else ()), *(batch or ()), *scheduler.drop_all()]:
                _resolve_error(ready.future, self._fatal)


def _characters(prompt: Prompt) -> int:
    return len(prompt.text or "") + len(prompt.pair or "")


def _fail(requests: Sequence[Request], error: Exception) -> None:
    for request in requests:
        _resolve_error(request.future, error)


def _resolve_error(future: Future[Answer], error: BaseException) -> None:
    """Give a future its error, whatever state it is in."""
    if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
        future.set_exception(error)
