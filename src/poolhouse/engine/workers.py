"""Workers: the threads that run batches.

A batch that is small is worth one core: without helpers there are no barriers, at which threads wait for each other, each
for a time slice where neighbours keep the cores busy. The thread that submitted it may compute it itself, where nothing
else runs or waits: to hand it over and back takes longer than a layer.

On a CPU two batches side by side, each on its half of the cores, beat one on all cores: nobody waits for the slowest
thread after every operation, and one worker computes while the other's callers are answered. One more worker, which has
all cores, runs what is too little to be shared out. Which of them takes what: see `poolhouse.engine.scheduler`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from poolhouse.engine.health import Faults
from poolhouse.engine.process import has_one_core, one_core, release_freed_memory
from poolhouse.engine.queue import WaitingRequest, cost_of
from poolhouse.engine.request import fail
from poolhouse.engine.runner import Launched, Runner
from poolhouse.engine.scheduler import Scheduler
from poolhouse.errors import ConfigError, EngineError
from poolhouse.models.model import Model
from poolhouse.models.native.transformer import Transformer

log = logging.getLogger("poolhouse")

# A batch of no more multiply-adds is computed on one core.
_ONE_CORE = 2**28
# By our own kernel, where more cores than its helpers have would be there for it.
_FEW_CORES = 2**31
# Nor has it more tokens than this, however small the model is.
_MOST_TOKENS = 256
# Between two times that freed memory is returned while batches run: it takes a few milliseconds, and to map it anew 30 or
# more; every second, that was 3 to 5 % of two cores.
_RELEASE_SECONDS = 5.0


class Workers:
    """One thread per worker of the scheduler, and the all-core worker's where there are several.

    On a device that can, a worker keeps one batch in flight.
    one_core_tokens: a batch of no more is computed on one core.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, faults: Faults, one_core_tokens: int = 0) -> None:
        self._runner, self._scheduler, self._faults = runner, scheduler, faults
        self._one_core_tokens = min(one_core_tokens, scheduler.budget)
        # None is the all-core worker, as in the scheduler.
        numbers: list[int | None] = list(range(scheduler.workers))
        if scheduler.workers > 1:
            numbers.append(None)
        self._running = dict.fromkeys(numbers, 0)
        self._next_release = time.monotonic() + _RELEASE_SECONDS
        # Held by the worker that runs a batch; a fork takes them all.
        self._computing = {number: threading.RLock() for number in numbers}
        self._threads: list[threading.Thread] = []
        # Of a caller that has its turn, as `_running` and `_computing` of workers.
        self._turn = threading.RLock() if scheduler.workers > 1 else self._computing[0]
        self._caller: threading.Thread | None = None
        self._callers_requests = 0

    def start(self) -> None:
        """Start the threads."""
        all_cores = torch.get_num_threads()
        # Only one worker takes all cores: with a second full pool of OpenMP workers, libgomp lets threads sleep between
        # operations.
        share = max(1, all_cores // self._scheduler.workers)
        cores = {number: all_cores if number is None else share for number in self._running}
        ready = threading.Barrier(len(cores) + 1)
        self._threads = [
            threading.Thread(
                target=self._begin,
                args=(number, count, ready),
                name=f"poolhouse-device-{'all-cores' if number is None else number}",
                daemon=True,
            )
            for number, count in cores.items()
        ]
        for thread in self._threads:
            thread.start()
        ready.wait()
        # What the threads set for themselves, torch would also set for threads that are new to it.
        torch.set_num_threads(all_cores)

    @property
    def alive(self) -> bool:
        """Whether all threads run, or were not needed so far."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def ended(self) -> bool:
        """Whether no thread of them runs, nor a caller in their place."""
        return self._caller is None and not any(thread.is_alive() for thread in self._threads)

    @property
    def running(self) -> int:
        """Sequences of the batches on the device."""
        return sum(self._running.values()) + self._callers_requests

    @property
    def include_this_thread(self) -> bool:
        """Whether the thread that calls this is one of them."""
        return threading.current_thread() in (*self._threads, self._caller)

    def join(self, seconds: float) -> None:
        """Wait until all have ended, for at most so long; one of them does not wait for itself."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._caller is not None and self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._turn.release()

    def hold(self, deadline: float) -> Callable[[], None]:
        """Let no batch begin, and wait until `deadline` (by `time.monotonic`) for those that run; returns what ends it."""
        locks = {id(lock): lock for lock in (*self._computing.values(), self._turn)}
        held = [lock for lock in locks.values() if lock.acquire(timeout=max(0.0, deadline - time.monotonic()))]

        def release() -> None:
            for lock in held:
                lock.release()

        return release

    def run_here(self, requests: list[WaitingRequest]) -> bool:
        """Compute requests in the thread that calls this; False where they have to wait for a worker.

        They have to where there are too many tokens for one core, where anything else runs or waits, and where this
        thread's own settings of torch would change what is computed.
        """
        tokens = sum(map(cost_of, requests))
        if not 0 < tokens <= self._one_core_tokens or self._runner.asynchronous or has_modes() or not has_one_core():
            return False
        scheduler = self._scheduler
        # An interrupt may come between any two lines.
        try:
            if not scheduler.begin_turn(tokens):
                return False
            with self._turn, one_core():
                self._caller, self._callers_requests = threading.current_thread(), len(requests)
                launched = self._runner.launch(sorted(requests, key=cost_of))
                if launched is not None:
                    self._runner.finish(launched)
        except (KeyboardInterrupt, SystemExit):
            raise  # meant for the caller, not for the engine
        except BaseException as error:  # noqa: BLE001 - whatever it is, the engine cannot go on
            self._die(error, requests)
        finally:
            if self._caller is threading.current_thread():
                self._caller, self._callers_requests = None, 0
            scheduler.end_turn()
        return True

    def _begin(self, worker: int | None, cores: int, ready: threading.Barrier) -> None:
        if cores != torch.get_num_threads():
            torch.set_num_threads(cores)
        ready.wait()
        self._work(worker)

    def _work(self, worker: int | None) -> None:
        """Run batches until the scheduler is closed and empty."""
        runner, scheduler = self._runner, self._scheduler
        flying: Launched | None = None
        batch: list[WaitingRequest] | None = None
        try:
            while True:
                self._running[worker] = 0 if flying is None else len(flying.requests)
                batch = scheduler.next(worker, block=flying is None)
                if batch is None and flying is None:
                    return
                self._running[worker] += len(batch or ())
                small = 0 < sum(map(cost_of, batch or ())) <= self._one_core_tokens
                with self._computing[worker], one_core() if small else nullcontext():
                    launched = runner.launch(batch) if batch else None
                    if not runner.asynchronous:
                        flying, launched = launched, None
                        scheduler.finished(worker)
                    if flying is not None:
                        runner.finish(flying)
                flying = launched
                # While nothing comes, the last callers' requests are not kept.
                batch = None
                if not runner.asynchronous:
                    self._release_memory()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the engine cannot go on
            self._die(error, [*(flying.requests if flying else ()), *(batch or ())])

    def _die(self, error: BaseException, requests: list[WaitingRequest]) -> None:
        """Fail these requests and all that wait, for good."""
        fatal = error if isinstance(error, EngineError) else EngineError(f"The engine failed: {error!r}")
        self._faults.die(fatal)
        self._scheduler.close()
        log.critical("The engine cannot go on: %s", error, exc_info=error)
        for request in [*requests, *self._scheduler.drop_all()]:
            fail(request.future, fatal)
        self._faults.notify()

    def _release_memory(self) -> None:
        """Return freed memory between what is in use, where that was not done lately.

        Packs of ever other sizes leave ever more of it.
        """
        now = time.monotonic()
        if now >= self._next_release:
            self._next_release = now + _RELEASE_SECONDS
            release_freed_memory()


def worker_count(requested: int | None, model: Model) -> int:
    """How many batches of a model run at a time; requested: the setting `lanes`, None for the default.

    Raises:
        ConfigError: more than one, where that cannot be.
    """
    possible = model.backbone.reentrant and model.facts.device.type == "cpu"
    if requested is None:
        # More than one core per worker was never measured.
        return 2 if possible and torch.get_num_threads() in (2, 3) else 1
    if requested > 1 and not possible:
        raise ConfigError(
            f"lanes={requested}: batches run side by side only on CPUs, and only of native models; this one is "
            f"{model.facts.served_by}, on {model.facts.device.type}."
        )
    return requested


def one_core_tokens(model: Model) -> int:
    """Tokens of a batch that is computed on one core; 0 for models of transformers, and on other devices."""
    sizes, backbone = model.facts.sizes, model.backbone
    if not backbone.reentrant or model.facts.device.type != "cpu":
        return 0
    # Tables are looked up. Nearly all else is read once per token.
    weights = max(1, sizes.parameters - sizes.vocabulary_size * sizes.hidden_size)
    tokens = min(_MOST_TOKENS, _ONE_CORE // weights)
    if isinstance(backbone, Transformer) and (few_rows := backbone.few_rows) is not None:
        # Its helpers cost nothing where they get no core. Many cores do more for a large model than these few.
        enough = torch.get_num_threads() <= 1 + few_rows.helpers
        tokens = max(tokens, few_rows.rows if enough else min(few_rows.rows, _FEW_CORES // weights))
    return tokens


def has_modes() -> bool:
    """Whether this thread would compute something else than a worker does: by autocast, a default device, a debugging mode."""
    stacks = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()  # noqa: SLF001 - no public name
    return stacks > 0 or torch.is_autocast_enabled("cpu")
