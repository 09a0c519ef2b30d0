"""Workers: the threads that run batches.

On a CPU two batches side by side, each on its half of the cores, beat one on all cores: nobody waits for the slowest
thread after every operation, and one worker computes while the other's callers are answered. One more worker, which has
all cores, runs what is too little to be shared out. Which of them takes what: see `poolhouse.engine.scheduler`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from poolhouse.engine.health import Faults
from poolhouse.engine.process import release_freed_memory
from poolhouse.engine.queue import WaitingRequest
from poolhouse.engine.request import fail
from poolhouse.engine.runner import Launched, Runner
from poolhouse.engine.scheduler import Scheduler
from poolhouse.errors import ConfigError, EngineError
from poolhouse.models.model import Model

log = logging.getLogger("poolhouse")

# Between two times that freed memory is returned while batches run: it takes a few milliseconds.
_RELEASE_SECONDS = 1.0


class Workers:
    """One thread per worker of the scheduler, and the all-core worker's where there are several.

    On a device that can, a worker keeps one batch in flight.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, faults: Faults) -> None:
        self._runner, self._scheduler, self._faults = runner, scheduler, faults
        # None is the all-core worker, as in the scheduler.
        numbers: list[int | None] = list(range(scheduler.workers))
        if scheduler.workers > 1:
            numbers.append(None)
        self._running = dict.fromkeys(numbers, 0)
        self._next_release = time.monotonic() + _RELEASE_SECONDS
        # Held by the worker that runs a batch; a fork takes them all.
        self._computing = {number: threading.RLock() for number in numbers}
        self._threads: list[threading.Thread] = []

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
        """Whether no thread of them runs."""
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def running(self) -> int:
        """Sequences of the batches on the device."""
        return sum(self._running.values())

    @property
    def include_this_thread(self) -> bool:
        """Whether the thread that calls this is one of them."""
        return threading.current_thread() in self._threads

    def join(self, seconds: float) -> None:
        """Wait until all have ended, for at most so long; one of them does not wait for itself."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def hold(self, deadline: float) -> Callable[[], None]:
        """Let no batch begin, and wait until `deadline` (by `time.monotonic`) for those that run; returns what ends it."""
        held = [
            lock for lock in self._computing.values() if lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
        ]

        def release() -> None:
            for lock in held:
                lock.release()

        return release

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
                with self._computing[worker]:
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
        except BaseException as error:
            fatal = error if isinstance(error, EngineError) else EngineError(f"The engine failed: {error!r}")
            self._faults.die(fatal)
            scheduler.close()
            log.critical("The engine cannot go on: %s", error, exc_info=error)
            for request in [*(flying.requests if flying else ()), *(batch or ()), *scheduler.drop_all()]:
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
