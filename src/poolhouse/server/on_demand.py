"""On demand: models of a folder are loaded at their first request, and closed when they are idle or others need the memory.

One model is loaded at a time, in the order of the first requests for them. Everything here belongs to one event loop; models
are loaded and closed in threads of their own.

    available --request--> loading --> loaded --idle, or memory is needed--> unloading --> available
                              |
                              +--> failed: until its files change, or for half a minute
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, ParamSpec, TypeVar, get_args

from poolhouse.engine.interface import EngineFacts, PoolingEngine
from poolhouse.engine.process import release_memory
from poolhouse.errors import EngineClosed, EngineError, PoolhouseError
from poolhouse.server.models_dir import Checkpoint, ModelsDir
from poolhouse.server.served import Admission, Listed, Served, State
from poolhouse.server.telemetry.metrics import Metrics, ModelStates, Queue
from poolhouse.server.wire.errors import Overloaded, Unavailable
from poolhouse.settings import ServerSettings, Settings

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("poolhouse")
# Why what still waits when a stop has waited long enough has no answer.
STOPPED = "The server was stopped before it could answer."

# A model that failed to load is not tried again within this time, unless its files change.
_SECONDS_TO_RETRY = 30.0
# Between two looks at the folders.
_SECONDS_TO_RESCAN = 0.2
# Characters of a reason, and seconds after which to ask again for what is being loaded.
_MAX_REASON, _SECONDS_TO_ASK_AGAIN = 500, 5.0

Reason = Literal["idle", "memory", "request", "died", "stop"]


@dataclass(slots=True, eq=False)
class _Resident:
    """A model in memory. keep_seconds: how long it stays while nobody uses it; None: as --unload-after says."""

    served: Served
    memory_bytes: int
    keep_seconds: float | None = None
    timer: asyncio.TimerHandle | None = None
    unused: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    at: float


@dataclass(slots=True, eq=False)
class _Model:
    """A model of the folder. waiting: requests that need it loaded. leaving: those before, that are being closed."""

    checkpoint: Checkpoint
    since: float
    admission: Admission
    resident: _Resident | None = None
    leaving: int = 0
    waiting: list[asyncio.Future[Served]] = field(default_factory=list)
    loading: bool = False
    failure: _Failure | None = None
    facts: EngineFacts | None = None
    last_used: float | None = None
    vanished: bool = False

    @property
    def state(self) -> State:
        if self.resident is not None:
            return "loaded"
        if self.loading:
            return "loading"
        if self.leaving:
            return "unloading"
        return "available" if self.failure is None else "failed"


class OnDemand:
    """The models of folders.

    taken: names that other models have. used_bytes: memory that these have, which counts within the limit.
    """

    def __init__(
        self, models_dir: ModelsDir, settings: ServerSettings, taken: frozenset[str] = frozenset(), used_bytes: int = 0
    ) -> None:
        self.models_dir = models_dir
        self.settings = settings
        self.taken = taken
        self.used_bytes = used_bytes
        self.limit = settings.memory_limit
        self.metrics: Metrics | None = None
        self.closed = False
        # What a device was lost of: no model runs on it any more, until the process is started again.
        self.fatal: EngineError | None = None
        self._models: dict[str, _Model] = {}
        self._skipped: dict[str, str] = {}
        self._taken_told: set[str] = set()
        self._queue: deque[_Model] = deque()
        self._working: asyncio.Task[None] | None = None
        self._closing: dict[_Resident, asyncio.Task[None]] = {}
        self._threads: set[threading.Thread] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rescanning = asyncio.Lock()
        self._scanned = time.monotonic()
        self._imported = False
        self._take(models_dir.scan({}, self._skipped))
        for name in (*settings.pin, *models_dir.by_name):
            if name not in self._models:
                log.warning("No model of --models-dir is called %s yet.", name)

    @classmethod
    def beside(cls, engines: Sequence[PoolingEngine], models_dir: ModelsDir, settings: ServerSettings) -> OnDemand:
        """Models on demand, beside engines that are always there.

        Raises:
            ConfigError: a folder that cannot be read.
        """
        facts = [engine.facts for engine in engines]
        taken = {name for one in facts for name in (one.name, *one.aliases, *one.unlisted_names, *one.adapters)}
        return cls(models_dir, settings, frozenset(taken), sum(one.weight_bytes for one in facts))

    @property
    def names(self) -> list[str]:
        """The names that requests may use."""
        return list(self._models)

    @property
    def busy(self) -> bool:
        """Whether a thread loads or closes a model."""
        return any(thread.is_alive() for thread in list(self._threads))

    @property
    def memory_bytes(self) -> int:
        """What all models in memory take, those that are always loaded among them."""
        residents = [model.resident.memory_bytes for model in list(self._models.values()) if model.resident is not None]
        return self.used_bytes + sum(residents) + sum(one.memory_bytes for one in list(self._closing))

    def __contains__(self, name: object) -> bool:
        return name in self._models

    def report_to(self, metrics: Metrics) -> None:
        """Count loads there, and tell the states of models."""
        self.metrics = metrics
        metrics.registry.register(
            ModelStates(
                lambda: ((one.name, one.state, one.memory_bytes) for one in self.listed()),
                lambda: self.memory_bytes,
                self.limit,
                get_args(State),
            )
        )

    def failed(self, name: str) -> bool:
        """Whether its last load failed."""
        return self._models[name].failure is not None

    def listed(self) -> Iterator[Listed]:
        """Every model, for lists."""
        for name, model in list(self._models.items()):
            resident, facts = model.resident, model.facts
            yield Listed(
                name=name,
                model=name,
                facts=facts,
                state=model.state,
                weight_bytes=facts.weight_bytes if resident and facts else model.checkpoint.weight_bytes,
                waiting=model.admission.waiting,
                since=model.since,
                memory_bytes=0 if resident is None else resident.memory_bytes,
                last_used=model.last_used if resident is None else resident.served.last_used,
                expires=None if resident is None else self._expires(name, resident),
                reason=None if model.failure is None else model.failure.reason,
            )

    async def rescan(self) -> None:
        """Look again at the folders; a scan that begins after this was called is awaited."""
        asked = time.monotonic()
        async with self._rescanning:
            if self._scanned > asked:
                return
            await asyncio.sleep(max(0.0, self._scanned + _SECONDS_TO_RESCAN - time.monotonic()))
            self._scanned = time.monotonic()
            known = {name: model.checkpoint for name, model in self._models.items()}
            try:
                found = await asyncio.to_thread(self.models_dir.scan, known, self._skipped)
            except PoolhouseError as error:
                log.error("The folders cannot be read, what was found before stays: %s", error)
                return
            self._take(found)

    def use(self, name: str) -> asyncio.Future[Served]:
        """The model in memory, held by this request; done at once where it is loaded.

        A future that was cancelled holds nothing, and the load goes on.

        Raises:
            Unavailable: it failed to load lately. Overloaded: too many requests wait for it.
        """
        model = self._models[name]
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Served] = self._loop.create_future()
        resident = model.resident
        if resident is not None and not resident.served.engine.alive:
            self._died(name, resident.served.engine.fatal)
            resident = None
        if resident is not None:
            future.set_result(_held(resident))
            return future
        self._refuse(name, model)
        model.waiting.append(future)
        if not model.loading:
            model.loading, model.failure = True, None
            self._queue.append(model)
            if self._working is None or self._working.done():
                self._working = self._loop.create_task(self._work())
        return future

    def keep(self, name: str, seconds: float) -> None:
        """How long a model stays after the request that holds it."""
        model = self._models.get(name)
        if model is not None and model.resident is not None:
            model.resident.keep_seconds = seconds

    def unload(self, name: str) -> None:
        """Close a model as soon as nobody uses it."""
        model = self._models.get(name)
        if model is not None and model.resident is not None and name not in self.settings.pin:
            self._evict(model, "request")

    def refuse_all(self) -> None:
        """Fail what waits, for a model or for an answer: the server stops."""
        self.closed = True
        for model in self._models.values():
            _settle(model, EngineClosed(STOPPED))
            if model.resident is not None:
                model.resident.served.engine.close(0)
        for resident in self._closing:
            if resident.served.holds:
                resident.served.engine.close(0)

    async def close(self) -> None:
        """Close all models, within the time that a stop may take."""
        self.closed = True
        if self._working is not None:
            self._working.cancel()
        for model in list(self._models.values()):
            _settle(model, EngineClosed(STOPPED))
            if model.resident is not None:
                self._evict(model, "stop")
        if self._closing:
            await asyncio.wait(self._closing.values(), timeout=self.settings.shutdown_seconds)

    def _take(self, found: Mapping[str, Checkpoint]) -> None:
        """Add what is new, and take away what is gone once it is not in memory."""
        now = time.time()
        for name, checkpoint in found.items():
            model = self._models.get(name)
            if name in self.taken:
                if name not in self._taken_told:
                    log.info("%s is skipped: a model that is always loaded has its name.", checkpoint.folder)
                    self._taken_told.add(name)
            elif model is None:
                admission = Admission(self.settings.max_queued_prompts)
                self._models[name] = _Model(checkpoint, now, admission)
            else:
                model.vanished = False
                if model.checkpoint.stamp != checkpoint.stamp or model.checkpoint.folder != checkpoint.folder:
                    model.checkpoint, model.failure = checkpoint, None
        for name in self._models.keys() - found.keys():
            self._models[name].vanished = True
            self._forget(self._models[name])

    def _forget(self, model: _Model) -> None:
        if model.vanished and model.resident is None and not model.loading and not model.leaving:
            self._models.pop(model.checkpoint.name, None)

    def _refuse(self, name: str, model: _Model) -> None:
        """Raise where there is no sense in waiting for a model."""
        if self.closed:
            raise EngineClosed("The server is being stopped.")
        failure = model.failure
        if failure is not None:
            left = failure.at + _SECONDS_TO_RETRY - time.monotonic()
            if left > 0:
                raise Unavailable(f"The model `{name}` could not be loaded: {failure.reason}", left)
        if len(model.waiting) >= self.settings.max_queued_prompts:
            model.waiting = [future for future in model.waiting if not future.done()]
        if len(model.waiting) >= self.settings.max_queued_prompts:
            raise Overloaded(
                f"The server is overloaded: {len(model.waiting)} requests wait for `{name}` to be loaded. "
                "Come again later.",
                _SECONDS_TO_ASK_AGAIN,
            )

    async def _work(self) -> None:
        """Load what requests wait for, one after the other."""
        while self._queue:
            model = self._queue[0]
            outcome: Exception | None = None
            try:
                await self._load(model)
            except Exception as error:  # noqa: BLE001 - whoever waits raises it, and the next model is loaded
                outcome = self._failed(model, error)
                # What it had read goes back; the error refers to it.
                del error
                await self._in_thread(_tidy)
            self._queue.popleft()
            model.loading = False
            if outcome is not None:
                _settle(model, outcome)
            self._forget(model)

    async def _load(self, model: _Model) -> None:
        """Make room for a model, load it, and give it to those that wait.

        Raises:
            Exception: why that is not possible.
        """
        name, checkpoint = model.checkpoint.name, model.checkpoint
        settings = self.models_dir.settings_of(checkpoint)
        weights, packs = await self._in_thread(self.models_dir.memory, settings, checkpoint)
        if not self._imported:
            # What was imported stays: the garbage collector need not walk it when a model is closed.
            gc.freeze()
            self._imported = True
        await self._make_room(name, weights + packs)
        log.info("%s is being loaded; it needs %s.", name, _shown(weights + packs))
        started = time.perf_counter()
        engine = await self._in_thread(self._open, name, settings)
        seconds = time.perf_counter() - started
        # Lists show it afterwards too; these parts hold a tokenizer, and would keep it.
        model.facts = replace(engine.facts, listwise=None, plugin=None, score_template=None, calibration=None)
        resident = self._resident(model, engine, (engine.facts.weight_bytes or weights) + packs)
        del engine
        log.info("%s is loaded, in %.1f seconds; it takes %s.", name, seconds, _shown(resident.memory_bytes))
        if self.metrics is not None:
            self.metrics.loads.labels(name).inc()
            self.metrics.load_seconds.labels(name).observe(seconds)
        for future in model.waiting:
            if not future.done():
                future.set_result(_held(resident))
        model.waiting.clear()
        if not resident.served.holds:
            self._unused(model, resident)

    def _open(self, name: str, settings: Settings) -> PoolingEngine:
        """In a thread: a model that is ready to answer."""
        engine = self.models_dir.open_engine(settings)
        try:
            engine.warm_up(self.settings.warmup)
            if self.closed:
                raise EngineClosed("The server is being stopped.")
        except BaseException:
            engine.close(0)
            raise
        engine.on_fatal(partial(self._tell_of_death, name))
        if self.metrics is not None:
            engine.observe(self.metrics.engine(name))
        return engine

    def _resident(self, model: _Model, engine: PoolingEngine, memory_bytes: int) -> _Resident:
        """Put an engine in its place."""

        def released(_: Served) -> None:
            self._unused(model, resident)

        name = model.checkpoint.name
        resident = _Resident(Served(name, engine, model.admission, released), memory_bytes)
        model.resident = resident
        if self.metrics is not None:
            self.metrics.follow([Queue(name, name, lambda: model.admission.waiting, partial(_running, model))])
        return resident

    def _unused(self, model: _Model, resident: _Resident) -> None:
        """Nobody uses it any more: close it now, or after a while."""
        if model.resident is not resident:
            resident.unused.set()
            return
        seconds = self._stays(model.checkpoint.name, resident)
        if seconds == 0:
            self._evict(model, "request")
        elif seconds is not None:
            loop = asyncio.get_running_loop()
            resident.timer = loop.call_later(seconds, self._evict, model, "idle")

    def _stays(self, name: str, resident: _Resident) -> float | None:
        """Seconds that a model stays while nobody uses it; None: for ever."""
        seconds = self.settings.unload_after if resident.keep_seconds is None else resident.keep_seconds
        return None if name in self.settings.pin or seconds is None or seconds == math.inf else seconds

    def _expires(self, name: str, resident: _Resident) -> float | None:
        seconds = self._stays(name, resident)
        return None if seconds is None else (resident.served.last_used or time.time()) + seconds

    async def _make_room(self, name: str, needed: int) -> None:
        """Close models that are not used, least recently used ones first, until that many bytes are free.

        Where all are in use, the one with the fewest prompts takes no more requests and is closed after its last one.

        Raises:
            DoesNotFit: there cannot be so much room.
        """
        if self.limit is None:
            return
        pinned = [model for model in self._residents() if model.checkpoint.name in self.settings.pin]
        left = self.limit - self.used_bytes - sum(model.resident.memory_bytes for model in pinned if model.resident)
        if needed > left:
            raise DoesNotFit(
                f"it needs {_shown(needed)} of memory, and of the {_shown(self.limit)} of --memory-limit "
                f"{_shown(max(0, left))} can be had."
            )
        while self.memory_bytes + needed > self.limit:
            if not self._closing:
                others = [model for model in self._residents() if model not in pinned]
                self._evict(min(others, key=_how_much_in_use), "memory")
            await asyncio.wait(self._closing.values(), return_when=asyncio.FIRST_COMPLETED)

    def _residents(self) -> list[_Model]:
        return [model for model in self._models.values() if model.resident is not None]

    def _evict(self, model: _Model, reason: Reason) -> None:
        """Give no more requests to a model, and close it after the last one."""
        resident = model.resident
        if resident is None:
            return
        if resident.timer is not None:
            resident.timer.cancel()
        model.resident = None
        model.leaving += 1
        model.last_used = resident.served.last_used
        task = asyncio.get_running_loop().create_task(self._close(model, resident, reason))
        self._closing[resident] = task

    async def _close(self, model: _Model, resident: _Resident, reason: Reason) -> None:
        name = model.checkpoint.name
        try:
            if resident.served.holds:
                await resident.unused.wait()
            await self._in_thread(_close, resident.served, self.settings.shutdown_seconds)
            log.info("%s is unloaded (%s).", name, reason)
        finally:
            del self._closing[resident]
            model.leaving -= 1
            if self.metrics is not None:
                self.metrics.unloads.labels(name, reason).inc()
            self._forget(model)

    def _failed(self, model: _Model, error: Exception) -> Exception:
        """Remember why a model could not be loaded; the error for those that wait."""
        name = model.checkpoint.name
        if isinstance(error, EngineClosed):
            return error
        expected = isinstance(error, PoolhouseError | OSError | MemoryError)
        told = str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
        # Callers need not know where files lie.
        reason = told.replace(str(model.checkpoint.folder), name)[:_MAX_REASON]
        log.error("%s could not be loaded: %s", name, told, exc_info=None if expected else error)
        model.failure = _Failure(reason, time.monotonic())
        if self.metrics is not None:
            self.metrics.load_failures.labels(name).inc()
        return Unavailable(f"The model `{name}` could not be loaded: {reason}", _SECONDS_TO_RETRY)

    def _tell_of_death(self, name: str, error: EngineError) -> None:
        """Called in a thread of the engine that died."""
        if self._loop is not None and not self.closed:
            self._loop.call_soon_threadsafe(self._died, name, error)

    def _died(self, name: str, error: EngineError | None) -> None:
        model = self._models.get(name)
        if model is None or model.resident is None or model.resident.served.engine.alive:
            return
        log.error("The engine of %s died, and is closed: %s", name, error)
        if model.resident.served.engine.facts.device != "cpu":
            self.fatal = error or EngineError(f"The engine of {name} died.")
        model.failure = _Failure(f"its engine died: {error}"[:_MAX_REASON], time.monotonic())
        self._evict(model, "died")

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call in a thread of its own, which goes on where nobody waits for it any more."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(call(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - whoever waits raises it
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001 - of native code, or an exit that a checkpoint's code asked for
                future.set_exception(EngineError(repr(error)))

        thread = threading.Thread(target=run, name="poolhouse-load", daemon=True)
        self._threads.add(thread)
        thread.start()
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._threads = {one for one in self._threads if one.is_alive()}


class DoesNotFit(PoolhouseError):
    """A model that takes more memory than there may be."""


def _close(served: Served, drain_seconds: float) -> None:
    """Close an engine, and give its memory back."""
    served.take_engine().close(drain_seconds)
    _tidy()


def _tidy() -> None:
    gc.collect()
    release_memory()


def _held(resident: _Resident) -> Served:
    if resident.timer is not None:
        resident.timer.cancel()
        resident.timer = None
    # What an earlier request asked for ends with it.
    resident.keep_seconds = None
    return resident.served.hold()


def _settle(model: _Model, error: Exception) -> None:
    """Fail the requests that wait for a model."""
    for future in model.waiting:
        if not future.done():
            future.set_exception(error)
    model.waiting.clear()


def _how_much_in_use(model: _Model) -> tuple[int, float]:
    served = model.resident.served if model.resident is not None else None
    if served is None:
        return 0, 0.0
    return served.engine.pending + 1 if served.holds else 0, served.last_used or 0.0


def _running(model: _Model) -> int:
    resident = model.resident
    return 0 if resident is None else resident.served.engine.running


def _shown(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
