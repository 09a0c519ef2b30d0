"""Engine: the one door to a model. `submit` requests, wait for their futures.

The way of a request through the files of this room:

    engine.py ----> intake.py ----> scheduler.py ----> workers.py ----> runner.py ----> its future
    accepted        checked,        waits in           taken into       one pass of
    or refused      tokenised       queue.py           a batch          the model

A caller's thread, or a tokenizer thread where there is much to tokenise, does the first two; a worker does the rest. A
caller that only waits does all for a short text, where nothing else runs or waits.
"""

from __future__ import annotations

import atexit
import logging
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any, NoReturn

import numpy as np

from poolhouse.engine import process
from poolhouse.engine.health import Faults
from poolhouse.engine.intake import Intake, alike
from poolhouse.engine.interface import WarmUpLevel
from poolhouse.engine.media import Media
from poolhouse.engine.observing import Guarded, Observer
from poolhouse.engine.options import EngineOptions, engine_facts
from poolhouse.engine.process import one_core
from poolhouse.engine.queue import Arrival, Caller, CallerQueue, TokenizerCall, Turns
from poolhouse.engine.request import Answer, LookedUp, Pending, Request, fail, start
from poolhouse.engine.runner import Runner
from poolhouse.engine.scheduler import Scheduler
from poolhouse.engine.workers import Workers, has_modes
from poolhouse.errors import EngineClosed, EngineError, InvalidRequest, NoStep
from poolhouse.inputs.content import Content, Image
from poolhouse.inputs.labels import Labels
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.models.model import Model
from poolhouse.models.native.static import Table
from poolhouse.packing.tokens import Ids, Tokens
from poolhouse.params import PoolingParams
from poolhouse.plugins import Plugin

log = logging.getLogger("poolhouse")

# Few texts of so many characters together are tokenised by their caller: quicker than waking a thread. Templates may be
# slow, so conversations are not.
_INLINE_REQUESTS = 64
_INLINE_CHARACTERS = 2000
# Texts per tokenizer call: enough to share the work among cores, few enough to start computing early.
_TEXTS_PER_CALL = 128
# The warm-up's text, and the tokens of its shortest prompt.
_WARM_UP_TEXT = "How warm is the water of the pool?"
_SHORTEST_WARM_UP = 8
# How long the end of the interpreter waits for a batch that runs.
_LAST_WAIT = 30.0


class Engine:
    """One model, ready to answer from any thread.

    static_tokenizer: of texts that are looked up instead of run, where the model has such.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        options: EngineOptions,
        plugin: Plugin | None = None,
        static_tokenizer: Tokenizer | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.facts = engine_facts(model, tokenizer, options, plugin)
        self._intake = Intake(model, options, tokenizer, static_tokenizer)
        self._runner = Runner(model, options.max_batch_tokens, options.prefix_sharing)
        # Whether texts are looked up where they are tokenised.
        self._is_table = isinstance(model.backbone, Table) and model.facts.device.type == "cpu"
        self._faults = Faults()
        self._closed = False
        # Whether the interpreter is being taken down.
        self._exiting = False
        self._begin()
        self._start()
        process.prepare_for_forks(self)
        # A thread inside torch while the interpreter is taken down aborts the process. Weak: whoever holds the engine keeps it.
        self._at_exit = partial(_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    def _begin(self) -> None:
        """All that threads share, new; no thread is started yet."""
        self._scheduler = Scheduler(self.options.max_batch_tokens, self.options.workers)
        self._turns = Turns[TokenizerCall]()
        self._tokenizer_threads = ThreadPoolExecutor(self.options.tokenizer_threads, "poolhouse-tokenizer")
        reader, options = self.model.facts.pictures, self.options.media
        self._media = None if reader is None else Media(reader, options, self.model.facts.max_tokens)
        self._pending = Pending()
        self._workers = Workers(self._runner, self._scheduler, self._faults, self.options.one_core_tokens)
        # A key per call of the tokenizer under way.
        self._preparing: set[object] = set()
        self._starting = threading.Lock()
        self._started = False

    def _start(self) -> None:
        with self._starting:
            if not self._started:
                self._workers.start()
                self._started = True

    @property
    def alive(self) -> bool:
        """Whether requests can still be answered."""
        return not self._closed and self.fatal is None and self._workers.alive

    @property
    def fatal(self) -> EngineError | None:
        """What the engine died of; None while it has not."""
        return self._faults.fatal

    @property
    def pending(self) -> int:
        """How many accepted requests have neither answer nor error yet."""
        return self._pending.count

    @property
    def running(self) -> int:
        """Sequences of the batches on the device."""
        return self._workers.running

    @property
    def processes(self) -> int:
        """How many processes run the model: this one."""
        return 1

    def on_fatal(self, callback: Callable[[EngineError], None]) -> None:
        """Call back, in a thread of the engine, when it dies; at once if it is dead."""
        self._faults.on_fatal(callback)

    def observe(self, observer: Observer | None) -> None:
        """Tell `observer` of the work from now on; None tells nobody."""
        self._intake.observer = self._runner.observer = None if observer is None else Guarded(observer)

    def limit(self, params: PoolingParams) -> Limit:
        """How long a prompt with these parameters may be."""
        return self._intake.limit(params)

    def submit(
        self, requests: Sequence[Request], waits: bool = False, caller: Caller | None = None
    ) -> list[Future[Answer]]:
        """Start work on requests; each future gets its answer or its error.

        waits: whether the caller does nothing but wait for them, so that its own thread may compute them.
        caller: of calls that are one, such as the windows of a large one: they share the engine with others as one does.
        A request that cannot be answered fails alone, through its future. Cancel a future to leave the queue.
        The requests of one call share the engine fairly with those of others of their priority.
        """
        futures = [request.future for request in requests]
        if self._refusal() is not None:
            self._refuse(futures)
            return futures
        if not self._started:
            self._start()
        self._pending.add(requests)
        queues = (caller or Caller()).submitting({request.priority for request in requests})
        if self._media is not None:
            requests = self._media.take(requests, queues, self._prepare)
        if len(requests) <= _INLINE_REQUESTS and sum(map(_characters, requests)) <= _INLINE_CHARACTERS:
            self._prepare(requests, queues, waits)
            return futures
        begins = range(0, len(requests), _TEXTS_PER_CALL)
        self._turns.add(
            [TokenizerCall(requests[begin : begin + _TEXTS_PER_CALL], queues) for begin in begins], min(queues)
        )
        for _ in begins:
            try:
                self._tokenizer_threads.submit(self._prepare_next)
            except RuntimeError:
                # The engine is being closed, or no thread is to be had: the caller's own does it.
                self._prepare_next()
        return futures

    def look_up(self, texts: Sequence[str], like: Request) -> Future[LookedUp | None] | None:
        """The vectors of many texts at once, of a model that is a table; None of one that is run.

        like: what is asked of each, by task and options. Texts that need more care, such as a cut or an error, must be
        submitted; where nothing comes, so must all.
        """
        if not self._is_table or self._refusal() is not None:
            return None
        try:
            return self._tokenizer_threads.submit(self._look_up, texts, like)
        except RuntimeError:
            return None  # the engine is being closed

    def warm_up(self, level: WarmUpLevel) -> None:
        """Run made-up prompts, so that the first real ones find kernels, allocator and caches warm.

        level: "none"; "fast", a short prompt for each task; "full", also whole batches of growing lengths, and a picture.

        Raises:
            EngineError: what the model failed with.
        """
        for requests in self._warm_up_rounds(level):
            for future in self.submit(requests):
                with suppress(NoStep):  # of a model that answers at certain tokens only; it has run
                    future.result()
        if level == "full":
            with suppress(InvalidRequest):  # a page may be more than the options allow
                for future in self.submit(self._warm_up_picture()):
                    future.result()

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]:
        """The tokens of prompts, however long they are, without running them.

        Raises:
            InvalidRequest: for the first that has none.
        """
        if self._media is not None:
            requests = [self._media.loaded(request) for request in requests]
        return self._intake.tokenize(requests)

    def conversation(self, messages: object, **options: Any) -> Prompt:
        """The prompt of a conversation; options as those of `Conversations.prompt`."""
        return self.options.conversations.prompt(messages, **options)

    def detokenize(self, ids: Sequence[int] | Ids, skip_special_tokens: bool = False) -> str:
        """The text of token ids.

        Raises:
            InvalidRequest: one out of the vocabulary.
        """
        return self.tokenizer.decoder.text(ids, skip_special_tokens)

    def token_strings(self, ids: Sequence[int] | Ids) -> list[str]:
        """The vocabulary entry of each id; raises as `detokenize` does."""
        return self.tokenizer.decoder.strings(ids)

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        return self.tokenizer.decoder.special_ids

    def load_adapter(self, name: str, source: str) -> None:
        """Make the adapter of a folder or hub id available under a name; a no-op if it is.

        Raises:
            InvalidRequest: the name is taken, or the model takes no adapter. CheckpointError: its files.
        """
        if self.model.adapters is None:
            raise InvalidRequest("Adapters are for models of the native families.", "lora_request", name)
        self.model.adapters.load(name, source)

    def close(self, drain_seconds: float = 30.0) -> None:
        """Answer what was accepted, for at most `drain_seconds`, then stop; the rest fails with EngineClosed.

        May be called again to wait longer for the batch that is running. In a thread of the engine (a callback, or the
        collection of garbage) it waits for nothing.
        """
        self._closed = True
        atexit.unregister(self._at_exit)
        if self._workers.include_this_thread:
            drain_seconds = 0.0
        deadline = time.monotonic() + drain_seconds
        if self._started:
            self._pending.wait(drain_seconds)
        if self._media is not None:
            self._media.close(EngineClosed("The engine was shut down before it could answer."))
        self._tokenizer_threads.shutdown(wait=False)
        self._scheduler.close()
        self._workers.join(max(0.0, deadline - time.monotonic()))
        for request in self._scheduler.drop_all():
            fail(request.future, EngineClosed("The engine was shut down before it could answer."))
        if not self._workers.ended:
            # What closed it did not wait for the batch that runs. The end of the interpreter does.
            atexit.register(self._workers.join, _LAST_WAIT)

    def hold(self, deadline: float) -> Callable[[], None]:
        """Run no batch, and wait until `deadline` for those that run; returns what ends it. Called before a fork."""
        return self._workers.hold(deadline)

    def forked(self) -> None:
        """Forget the threads, which this process does not have; the next request starts new ones. Called after a fork."""
        fatal = self.fatal
        device = self.model.facts.device
        if device.type != "cpu":
            fatal = fatal or EngineError(
                f"This process was forked from the one that opened {self.facts.name} on {device}, and cannot use that device. "
                "Open the model in this process, or start processes by 'spawn' (LLM objects may be pickled)."
            )
        self._faults = Faults()
        if fatal is not None:
            self._faults.die(fatal)
        self._begin()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "An engine has threads and cannot be pickled or copied. Pickle its LLM, which opens again from its settings, "
            "or open the model in the other process."
        )

    def _exit(self, seconds: float = _LAST_WAIT) -> None:
        """The interpreter ends, and all threads with it that might wait for answers: end only what runs."""
        self._exiting = self._closed = True
        deadline = time.monotonic() + seconds
        if self._media is not None:
            self._media.close()
        self._scheduler.close()
        self._scheduler.drop_all()
        self._workers.join(seconds)
        while self._preparing and time.monotonic() < deadline:
            time.sleep(0.001)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Not where __init__ failed, nor while the interpreter is taken apart: its modules are gone, and `_exit` has run.
        if "_at_exit" in self.__dict__ and not self._exiting and not finalizing():
            self.close()

    def _warm_up_rounds(self, level: WarmUpLevel) -> Iterator[list[Request]]:
        """Requests to run one list after the other.

        fast: a short text for each task. full: then, for every length up to the longest prompt or a whole batch, each
        twice the last, one prompt alone and as many as fill a batch of each worker.
        """
        if level == "none":
            return
        options, tasks, max_tokens = self.options, self.facts.tasks, self.facts.max_tokens
        # Queries may be looked up instead of run.
        labels = Labels(("label",)) if self.facts.reads_labels else None
        texts = [Request(Prompt(_WARM_UP_TEXT), task, input_type="document", labels=labels) for task in tasks]
        (tokens,) = self.tokenize(texts[:1])
        longest = min(max_tokens, options.max_prompt_tokens or max_tokens, options.max_batch_tokens)
        if len(tokens) <= longest:
            yield texts
        if level == "full":
            lengths = [longest]
            while lengths[-1] // 2 >= _SHORTEST_WARM_UP:
                lengths.append(lengths[-1] // 2)
            for length in reversed(lengths):
                prompt = Prompt(None, np.resize(tokens.ids, length))
                if labels is not None:
                    # Of one token a word, beside those of the label.
                    prompt = Prompt("a " * (length - len(tokens)))
                request = partial(Request, prompt, tasks[0], input_type="document", labels=labels)
                yield [request()]
                yield [request() for _ in range(options.workers * (options.max_batch_tokens // length))]

    def _warm_up_picture(self) -> list[Request]:
        """A page, of models that read pictures; their processor is imported thereby."""
        reader = self.model.facts.pictures
        if reader is None or find_spec("PIL") is None:
            return []
        text, picture = Content((_WARM_UP_TEXT,)), Content((_blank(),))
        pair = reader.pair is not None
        prompt = Prompt(None, content=text if pair else picture, pair_content=picture if pair else None)
        return [Request(prompt, self.facts.tasks[0], input_type="document")]

    def _refusal(self) -> EngineError | None:
        """Why no request is taken any more; None while they are."""
        return self.fatal or (EngineClosed("The engine is shut down.") if self._closed else None)

    def _refuse(self, futures: Sequence[Future[Answer]]) -> None:
        """Say why these are not taken, except to a thread that the end of the interpreter stops: it would only print it."""
        if self._exiting and threading.current_thread().daemon:
            return
        refusal = self._refusal() or EngineClosed("The engine is shut down.")
        for future in futures:
            fail(future, refusal)

    def _look_up(self, texts: Sequence[str], like: Request, submitted: float | None = None) -> LookedUp | None:
        """Those of these texts of a table that need no special care; None where there are none."""
        self._preparing.add(call := object())
        begun = time.perf_counter()
        try:
            short = None if self._exiting else self._intake.short(texts, like)
            if short is None:
                return None
            tokenized = time.perf_counter()
            arrival = Arrival(begun if submitted is None else submitted, tokenized - begun)
            with one_core():
                vectors = self._runner.look_up(*short, arrival)
            timing = arrival.timing(tokenized, time.perf_counter())
            return None if vectors is None else LookedUp(short[0], vectors, timing)
        except Exception:  # noqa: BLE001 - where they are run, it is said whose fault it is
            return None
        finally:
            self._preparing.discard(call)

    def _answer_short(self, requests: Sequence[Request], queues: Mapping[int, CallerQueue]) -> Sequence[Request]:
        """Answer requests to a table for plain texts that are asked for alike; returns those that need more care."""
        found, asked = None, alike(requests)
        if asked and not has_modes():
            texts = [request.prompt.text or "" for request in asked]
            found = self._look_up(texts, asked[0], queues[asked[0].priority].submitted)
        if found is None:
            return requests
        for request, answer in zip(asked, found.answers(len(asked)), strict=True):
            if answer is not None and start(request.future):
                request.future.set_result(answer)
        return [request for request in requests if not request.future.done()]

    def _prepare_next(self) -> None:
        call = self._turns.next()
        if call is not None:
            self._prepare(*call)

    def _prepare(self, requests: Sequence[Request], queues: Mapping[int, CallerQueue], waits: bool = False) -> None:
        """Tokenise requests and let them wait for their batch, or be computed here. queues: theirs, by priority."""
        self._preparing.add(call := object())
        try:
            if self._exiting:
                # A daemon thread that submits at the last moment: native code that it entered now would be torn down with it.
                return
            if self.fatal is not None:
                _fail(requests, self.fatal)
                return
            if self._scheduler.closed:
                self._refuse([request.future for request in requests])
                return
            if self._is_table:
                requests = self._answer_short(requests, queues)
            waiting = self._intake.waiting(requests, queues)
            if waits and self._workers.run_here(waiting):
                return
            if not self._scheduler.add(waiting):
                self._refuse([request.future for request in waiting])
        except (KeyboardInterrupt, SystemExit) as end:
            _fail(requests, EngineError(f"Preparing the request was interrupted: {end!r}"))
            raise
        except BaseException as error:
            # A panic of native code is no Exception.
            log.error("Preparing %d requests failed", len(requests), exc_info=error)
            _fail(requests, EngineError(f"Preparing the request failed: {error}"))
        finally:
            self._preparing.discard(call)


def _blank() -> Image:
    """A white page for the warm-up, of about a thousand patches."""
    from PIL.Image import new

    return Image(new("RGB", (448, 640), "white"), "warm_up")


def _characters(request: Request) -> float:
    """How many characters there are to tokenise; of a conversation nobody knows before it is rendered."""
    prompt = request.prompt
    if prompt.text is None and prompt.conversation is not None:
        return math.inf
    return len(prompt.text or "") + len(prompt.pair or "")


def _exit(engine: weakref.ref[Engine]) -> None:
    held = engine()
    if held is not None:
        held._exit()  # noqa: SLF001 - it is this module's own


def _fail(requests: Sequence[Request], error: Exception) -> None:
    for request in requests:
        fail(request.future, error)
