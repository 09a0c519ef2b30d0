"""Replicas: one model in several processes, as one engine: they are started, shared out, started again, and renewed.

`start_engine` is the door: from settings to an engine, in this process or in replicas. Nothing here imports torch.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NoReturn, cast

from poolhouse.engine import process
from poolhouse.engine.dispatch import Dispatch
from poolhouse.engine.health import Faults
from poolhouse.engine.interface import EngineFacts, OfflineEngine, ReplicaState, WarmUpLevel
from poolhouse.engine.observing import Guarded, Observer
from poolhouse.engine.queue import Caller
from poolhouse.engine.replica import Replica, StartFailed
from poolhouse.engine.replica_process import Order, RemoteFacts
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import ConfigError, EngineClosed, EngineError
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.listwise import ListwisePrompt
from poolhouse.packing.tokens import Ids, Tokens
from poolhouse.params import PoolingParams
from poolhouse.plugins import Plugin
from poolhouse.settings import Settings

log = logging.getLogger("poolhouse")

# `replicas="auto"` on CPUs: one for so many cores.
_CORES_PER_REPLICA = 8
# Between two starts of a replica that failed or died at once, in seconds: nothing, 1, 2, 4, ... and at most this.
_LONGEST_DELAY = 30.0
# One that lived so long did not die of its start.
_SECONDS_TO_PROVE = 60.0
# Starts of one replica in a row that fail before the engine gives up, where no other is up.
_MAX_FAILED_STARTS = 5
# How long a method's call to a replica may take; that of a whole model's warm-up; how long an old one may take to answer
# what it has, before its requests are given to others.
_CALL_SECONDS, _WARM_UP_SECONDS, _DRAIN_SECONDS = 60.0, 3600.0, 300.0
# Between two looks whether a replica is up.
_SECONDS_TO_LOOK = 0.1
_SHUT_DOWN = "The engine is shut down."
# How long replicas may take to end, beyond what they were told.
_SECONDS_TO_END = 10.0


def start_engine(settings: Settings) -> OfflineEngine:
    """Load what `settings` name and start its engine: in this process, or in as many others as they say.

    Raises:
        ConfigError, CheckpointError: with a message for the user.
    """
    gpus = _gpus() if settings.replicas != 1 and settings.device in ("auto", "cuda") else 0
    automatic = gpus or max(1, process.usable_cores() // _CORES_PER_REPLICA)
    count = automatic if settings.replicas == "auto" else settings.replicas
    if count == 1:
        # torch takes a second to import, and is not needed beside replicas.
        from poolhouse.engine.open import open_engine

        return open_engine(settings)
    return Replicas(settings, count, gpus)


def _gpus() -> int:
    """How many CUDA devices torch finds, without importing it here."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    found = subprocess.run(asked, check=False, capture_output=True, text=True)  # noqa: S603
    return int(found.stdout) if found.returncode == 0 and found.stdout.strip().isdigit() else 0


@dataclass(slots=True, eq=False)
class _Slot:
    """The place of one replica, whichever process fills it.

    settings, cores: of each process here. replica: the one that gets requests. failures: starts in a row that failed, or
    were followed by an early death. trouble: why there is none. renewed: whether `restart` is at it.
    """

    number: int
    settings: Settings
    cores: tuple[int, ...]
    replica: Replica | None = None
    restarts: int = 0
    failures: int = 0
    trouble: str = "is being started"
    renewed: bool = False

    @property
    def delay(self) -> float:
        """Seconds until the next start."""
        return 0.0 if self.failures < 2 else min(2.0 ** (self.failures - 2), _LONGEST_DELAY)


class Replicas:
    """One model in several processes, ready to answer from any thread.

    gpus: how many there are to be shared; 0: they run on the one device that is named, or on shares of the cores.

    Raises:
        ConfigError, CheckpointError: with a message for the user, what the first replica says that could not start.
    """

    def __init__(self, settings: Settings, count: int, gpus: int = 0) -> None:
        self._slots = _slots(settings, count, gpus)
        threads = str(max(1, process.usable_cores() // count))
        self._environment = process.environment_of_replicas(threads)
        self._dispatch = Dispatch()
        self._faults = Faults()
        self._closed = threading.Event()
        # Whether the interpreter is being taken down.
        self._exiting = False
        self._alive: set[Replica] = set()
        self._lock = threading.RLock()
        self._renewing = threading.Lock()
        self._warm_up: WarmUpLevel = "none"
        self._adapters: dict[str, str] = {}
        self._limit = lru_cache(256)(partial(_limit, weakref.ref(self)))
        self.facts = self._start_all()
        process.prepare_for_forks(self)
        self._at_exit = partial(_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    # --- What engines have ---

    @property
    def alive(self) -> bool:
        """Whether requests are taken; while no replica is up they wait for one, see `trouble`."""
        return not self._closed.is_set() and self.fatal is None

    @property
    def fatal(self) -> EngineError | None:
        """What ended all of them; None while nothing has."""
        return self._faults.fatal

    @property
    def pending(self) -> int:
        """How many accepted requests have neither answer nor error yet."""
        return self._dispatch.pending

    @property
    def running(self) -> int:
        """Sequences of the batches on all devices."""
        return sum(self._ask_each("running"))

    @property
    def processes(self) -> int:
        """How many processes run the model."""
        return len(self._slots)

    @property
    def states(self) -> tuple[ReplicaState, ...]:
        """Each replica, as metrics show it."""
        with self._lock:
            return tuple(
                ReplicaState(
                    slot.number,
                    slot.replica is not None,
                    slot.restarts,
                    0 if slot.replica is None else slot.replica.outstanding,
                )
                for slot in self._slots
            )

    @property
    def trouble(self) -> str | None:
        """Why no replica can answer at present; None while one can."""
        with self._lock:
            if any(slot.replica is not None for slot in self._slots):
                return None
            return "; ".join(f"replica {slot.number} {slot.trouble}" for slot in self._slots)

    def on_fatal(self, callback: Callable[[EngineError], None]) -> None:
        """Call back when no replica can be started any more; at once if that is so."""
        self._faults.on_fatal(callback)

    def observe(self, observer: Observer | None) -> None:
        """Tell `observer` of the work from now on; None tells nobody."""
        self._dispatch.observer = None if observer is None else Guarded(observer)
        for replica in self._dispatch.up:
            replica.observe(observer is not None)

    def submit(
        self, requests: Sequence[Request], waits: bool = False, caller: Caller | None = None
    ) -> list[Future[Answer]]:
        """Start work on requests; each future gets its answer or its error.

        waits: without effect, since no thread of this process computes. caller: see `Engine.submit`; calls share each
        replica fairly.
        """
        # A daemon thread that still asks while the interpreter ends would only print its error.
        if not (self._exiting and threading.current_thread().daemon):
            self._dispatch.submit(requests, None if caller is None else caller.number)
        return [request.future for request in requests]

    def limit(self, params: PoolingParams) -> Limit:
        """How long a prompt with these parameters may be."""
        limit: Limit = self._limit(params)
        return limit

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]:
        """The tokens of prompts, however long they are, without running them; see `Engine.tokenize`."""
        tokens: list[Tokens] = self._ask("tokenize", requests=requests)
        return tokens

    def detokenize(self, ids: Sequence[int] | Ids, skip_special_tokens: bool = False) -> str:
        """The text of token ids; see `Engine.detokenize`."""
        return str(self._ask("detokenize", ids, skip_special_tokens))

    def token_strings(self, ids: Sequence[int] | Ids) -> list[str]:
        """The vocabulary entry of each id; see `Engine.token_strings`."""
        strings: list[str] = self._ask("token_strings", ids)
        return strings

    def look_up(self, texts: Sequence[str], like: Request) -> None:
        """None: a table of other processes is asked by requests."""

    def load_adapter(self, name: str, source: str) -> None:
        """Make the adapter available in every replica, also in those that are started later; see `Engine.load_adapter`."""
        self._ask_each("load_adapter", name, source, seconds=_WARM_UP_SECONDS)
        self._adapters[name] = source

    def warm_up(self, level: WarmUpLevel) -> None:
        """Run made-up prompts in every replica, and in each that is started later before it gets requests."""
        self._warm_up = level
        self._ask_each("warm_up", level, seconds=_WARM_UP_SECONDS)

    def close(self, drain_seconds: float = 30.0) -> None:
        """Answer what was accepted, for at most `drain_seconds`, then end all processes; the rest fails with EngineClosed."""
        if self._closed.is_set() and not self._alive:
            return
        atexit.unregister(self._at_exit)
        with self._lock:
            own_thread = any(replica.includes_this_thread for replica in self._alive)
        self._closed.set()
        if self.fatal is None and not own_thread:
            self._dispatch.wait(drain_seconds)
        self._end(EngineClosed("The engine was shut down before it could answer."))

    # --- What replicas have beside ---

    def restart(self) -> None:
        """Replace the processes one after the other, without losing a request; returns when all are new.

        A new process is there before the old one goes, where memory allows; else it is started when the old one has
        answered what it had, and the others get all requests meanwhile. What is loaded is what the files hold now.

        Raises:
            ConfigError, CheckpointError: the model cannot be loaded any more; the old processes go on.
        """
        asked = time.monotonic()
        with self._renewing:
            for slot in self._slots:
                # One that is being started may have read the old files; one that was started since is new already.
                while slot.replica is None and not self._closed.wait(_SECONDS_TO_LOOK):
                    pass
                with self._lock:
                    old = slot.replica
                    slot.renewed = old is not None and old.born < asked and not self._closed.is_set()
                if old is None or not slot.renewed:
                    continue
                try:
                    self._renew(slot, old)
                finally:
                    with self._lock:
                        slot.renewed = False
                        if slot.replica is None:
                            self._revive_later(slot)

    def hold(self, deadline: float) -> Callable[[], None]:
        """Nothing need be held: a fork has no part in what the replicas do. Called before a fork."""
        return lambda: None

    def forked(self) -> None:
        """The replicas answer the process that started them, not this one. Called after a fork."""
        replicas, self._alive = self._alive, set()
        for replica in replicas:
            replica.abandon()
        error = EngineError(
            f"This process was forked from the one that started the replicas of {self.facts.name}. Open the model in this "
            "process, or start processes by 'spawn' (LLM objects may be pickled)."
        )
        self._lock, self._renewing, self._closed = threading.RLock(), threading.Lock(), threading.Event()
        for slot in self._slots:
            slot.replica = None
        self._faults = Faults()
        self._faults.die(error)
        self._dispatch = Dispatch()
        self._dispatch.end(error, error)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Replicas have threads and cannot be pickled or copied. Pickle their LLM, which opens again from its settings, "
            "or open the model in the other process."
        )

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Not where __init__ failed, nor while the interpreter is taken apart.
        if "_at_exit" in self.__dict__ and not finalizing():
            self.close()

    # --- Starting ---

    def _start_all(self) -> EngineFacts:
        """Start all at once, and wait until each is ready; the facts of the first.

        Raises:
            what the first, in order, could not start of; then none runs.
        """
        try:
            replicas = [self._launch(slot) for slot in self._slots]
            found = [replica.started.result() for replica in replicas]
        except BaseException as error:
            self._end(EngineClosed(_SHUT_DOWN), at_once=True)
            if isinstance(error, StartFailed):
                raise error.error from None
            raise
        for slot, replica in zip(self._slots, replicas, strict=True):
            self._take_in(slot, replica)
        log.info("%d replicas of %s are up: %s.", len(replicas), found[0].facts.name, _places(self._slots))
        return self._facts(found[0])

    def _launch(self, slot: _Slot) -> Replica:
        """Begin to start a process for a slot."""
        try:
            settings = pickle.dumps(slot.settings)
        except Exception as error:
            raise ConfigError(
                f"replicas: a setting cannot be sent to another process; a function in hf_overrides must stand in a "
                f"module: {error}"
            ) from error
        order = Order(settings, slot.cores, self._warm_up, log.getEffectiveLevel())
        with self._lock:
            if self._closed.is_set():
                raise EngineClosed(_SHUT_DOWN)
            lost = partial(_lost, weakref.ref(self))
            replica = Replica(slot.number, order, self._environment, self._dispatch, lost)
            self._alive.add(replica)
        return replica

    def _take_in(self, slot: _Slot, replica: Replica) -> None:
        """Let a replica that is ready have requests, from the slot's last one on."""
        for name, source in self._adapters.items():
            replica.call("load_adapter", name, source, seconds=_WARM_UP_SECONDS)
        if self._dispatch.observer is not None:
            replica.observe(True)
        with self._lock:
            if replica.ended is not None:
                raise EngineError(f"Replica {replica.number} {replica.ended}.")
            slot.replica = replica
            self._dispatch.add(replica)

    def _facts(self, remote: RemoteFacts) -> EngineFacts:
        """Facts whose parts that work with the tokenizer ask a replica."""
        ask = partial(_ask_of, weakref.ref(self))
        plugin = None if remote.plugin is None else cast("Plugin", _RemotePlugin(ask, *remote.plugin))
        return replace(remote.facts, listwise=_RemoteListwise(ask) if remote.listwise else None, plugin=plugin)

    # --- Death and life ---

    def _lost(self, replica: Replica) -> None:
        """A process has ended; of one that was wanted a new one is started."""
        with self._lock:
            self._alive.discard(replica)
            slot = self._slots[replica.number]
            if slot.replica is not replica or self._closed.is_set():
                return
            # Again: it may have become one of those that get requests while it died.
            self._dispatch.lost(replica)
            slot.replica = None
            slot.restarts += 1
            slot.trouble = replica.ended or ""
            slot.failures = 1 if time.monotonic() - replica.born > _SECONDS_TO_PROVE else slot.failures + 1
            log.error("Replica %d %s. It is started again.", slot.number, slot.trouble)
            if not slot.renewed:
                self._revive_later(slot)

    def _revive_later(self, slot: _Slot) -> None:
        if not self._closed.is_set():
            arguments = (weakref.ref(self), slot, self._closed)
            threading.Thread(
                target=_revive, args=arguments, name=f"poolhouse-revive-{slot.number}", daemon=True
            ).start()

    def _risen(self, slot: _Slot, replica: Replica | None, error: BaseException | None) -> bool:
        """Whether a slot needs no further start: its replica is ready, or nobody wants it any more."""
        if error is None and replica is not None:
            try:
                self.facts = self._facts(replica.started.result())
                self._take_in(slot, replica)
                log.info("Replica %d is up again.", slot.number)
            except Exception as failure:  # noqa: BLE001 - it died in the meantime, or lacks an adapter
                error = failure
                replica.kill()
        if error is None or self._closed.is_set():
            return True
        with self._lock:
            slot.failures += 1
            slot.trouble = f"could not be started: {error}"
            hopeless = slot.failures >= _MAX_FAILED_STARTS and self.trouble is not None
        log.error("Replica %d %s Next try in %g seconds.", slot.number, slot.trouble.rstrip(".") + ".", slot.delay)
        if hopeless:
            self._die(EngineError(f"No replica can be started: {self.trouble}"))
        return hopeless

    def _die(self, error: EngineError) -> None:
        self._faults.die(error)
        log.critical("The engine cannot go on: %s", error)
        self._end(error)
        self._faults.notify()

    def _renew(self, slot: _Slot, old: Replica) -> None:
        """Replace one process by a new one."""
        needed, spare = process.resident_memory(old.process.pid), process.spare_memory()
        beside = needed is None or spare is None or needed < spare
        if beside:
            new = self._launch(slot)
            try:
                self.facts = self._facts(new.started.result())
            except StartFailed as failed:
                if not failed.of_memory:
                    log.error("Replica %d could not be renewed, the old one goes on: %s", slot.number, failed.error)
                    raise failed.error from None
                log.warning(
                    "There is no memory for a second replica %d beside the old one: one after the other.", slot.number
                )
            else:
                self._take_in(slot, new)
                self._retire(old)
                log.info("Replica %d was renewed.", slot.number)
                return
        with self._lock:
            slot.replica = None
            slot.trouble = "is being renewed"
        self._retire(old)
        new = self._launch(slot)
        try:
            self.facts = self._facts(new.started.result())
        except StartFailed as failed:
            slot.trouble = f"could not be started: {failed.error}"
            log.error("Replica %d could not be renewed: %s", slot.number, failed.error)
            raise failed.error from None
        self._take_in(slot, new)
        log.info("Replica %d was renewed.", slot.number)

    def _retire(self, old: Replica) -> None:
        """Let a process answer what it has, then end; where that takes too long, others answer."""
        self._dispatch.remove(old)
        self._dispatch.wait_for(old, _DRAIN_SECONDS, self._closed.is_set)
        old.close()
        old.join(_SECONDS_TO_END)

    def _end(self, error: EngineError, at_once: bool = False) -> None:
        """End all processes; whoever still waits gets the error."""
        self._closed.set()
        self._dispatch.end(error, self.fatal or EngineClosed(_SHUT_DOWN), self._exiting)
        with self._lock:
            replicas = list(self._alive)
        for replica in replicas:
            if at_once or not replica.started.done():
                replica.kill()
            else:
                replica.close()
        deadline = time.monotonic() + _SECONDS_TO_END
        for replica in replicas:
            replica.join(max(0.0, deadline - time.monotonic()))

    # --- Asking ---

    def _ask(self, path: str, *arguments: Any, requests: Sequence[Request] | None = None) -> Any:
        """What a method of an engine returns, of the replica with the least to do; of another one where that dies.

        Raises:
            EngineError: none is up. What the method raises.
        """
        if not self.alive:
            raise self.fatal or EngineClosed(_SHUT_DOWN)
        for replica in self._dispatch.up:
            try:
                return replica.call(path, *arguments, requests=requests, seconds=_CALL_SECONDS)
            except EngineError:
                if replica.ended is None:
                    raise
        raise EngineError(f"No replica is up: {self.trouble or 'they have just died'}.")

    def _ask_each(self, path: str, *arguments: Any, seconds: float = _CALL_SECONDS) -> list[Any]:
        """What a method of each engine returns; those that die meanwhile are left out."""
        results = []
        for replica in self._dispatch.up:
            try:
                results.append(replica.call(path, *arguments, seconds=seconds))
            except EngineError:
                if replica.ended is None:
                    raise
        return results


def _limit(replicas: weakref.ref[Replicas], params: PoolingParams) -> Limit:
    limit: Limit = _ask_of(replicas, "limit", params)
    return limit


def _ask_of(replicas: weakref.ref[Replicas], path: str, *arguments: Any) -> Any:
    held = replicas()
    if held is None:
        raise EngineClosed(_SHUT_DOWN)
    return held._ask(path, *arguments)  # noqa: SLF001 - it is this module's own


class _RemoteListwise:
    """Prompts of a listwise reranker, written in a replica."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def pack(self, query: str, documents: Sequence[str], instruction: str | None, limit: Limit) -> list[ListwisePrompt]:
        """Prompts that hold all documents in their order."""
        prompts: list[ListwisePrompt] = self._ask("facts.listwise.pack", query, documents, instruction, limit)
        return prompts


class _RemotePlugin:
    """A plugin that works in a replica. task, merges: whether it has these of a plugin's further attributes."""

    def __init__(self, ask: Callable[..., Any], task: str | None, merges: bool) -> None:
        names = ["parse_data", "pre_process", "post_process", *(["merge_pooling_params"] if merges else [])]
        for name in names:
            setattr(self, name, partial(ask, f"facts.plugin.{name}"))
        if task is not None:
            self.task = task


def _slots(settings: Settings, count: int, gpus: int) -> list[_Slot]:
    """The place of each replica: a GPU in turn, or the device that is named, or its share of the cores."""
    alone = settings.model_copy(update={"replicas": 1})
    if gpus:
        return [
            _Slot(number, alone.model_copy(update={"device": f"cuda:{number % gpus}"}), ()) for number in range(count)
        ]
    if settings.device not in ("auto", "cpu"):
        return [_Slot(number, alone, ()) for number in range(count)]
    shares = process.shares_of_cores(count)
    if len({core for share in shares for core in share}) < count:
        log.warning("There are more replicas (%d) than cores: they take turns.", count)
    return [_Slot(number, alone, cores) for number, cores in enumerate(shares)]


def _places(slots: Sequence[_Slot]) -> str:
    """Where they run, for the log."""
    on = [f"cores {','.join(map(str, slot.cores))}" if slot.cores else slot.settings.device for slot in slots]
    return "; ".join(f"replica {slot.number} on {where}" for slot, where in zip(slots, on, strict=True))


def _lost(replicas: weakref.ref[Replicas], replica: Replica) -> None:
    held = replicas()
    if held is not None:
        held._lost(replica)  # noqa: SLF001


def _revive(replicas: weakref.ref[Replicas], slot: _Slot, closed: threading.Event) -> None:
    """Start a process for a slot, again and again until one is ready; nothing here keeps the replicas in memory."""
    while not closed.wait(slot.delay):
        held = replicas()
        if held is None:
            return
        replica: Replica | None = None
        error: BaseException | None = None
        try:
            replica = held._launch(slot)  # noqa: SLF001
        except (EngineClosed, OSError, RuntimeError) as failed:
            error = failed
        del held
        if replica is not None:
            failure = replica.started.exception()
            error = failure.error if isinstance(failure, StartFailed) else failure
        held = replicas()
        if held is None or held._risen(slot, replica, error):  # noqa: SLF001
            return
        del held


def _exit(replicas: weakref.ref[Replicas]) -> None:
    held = replicas()
    if held is not None:
        held._exiting = True  # noqa: SLF001
        # Told to close, they would fail what daemon threads still wait for, which would only print it.
        held._end(EngineClosed(_SHUT_DOWN), at_once=True)  # noqa: SLF001
