"""Replica process: `python -m poolhouse.engine.replica_process FD`, an engine that answers the process that started it.

    channel ─► reader ─► engine.submit ─► futures ─► outbox ─► sender ─► channel
                 └─────► threads for calls ────────────┘

The reader is there from the first moment: where the channel ends, the other process has ended, and so does this one.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

from poolhouse.engine import process
from poolhouse.engine.channel import Channel, Row, columns_of, gathered, request_of
from poolhouse.engine.interface import EngineFacts, WarmUpLevel
from poolhouse.engine.observing import BatchRun
from poolhouse.engine.queue import Caller
from poolhouse.engine.request import Answer
from poolhouse.errors import ConfigError, EngineError
from poolhouse.settings import Settings

if TYPE_CHECKING:
    from poolhouse.engine.engine import Engine

log = logging.getLogger("poolhouse")

# Answers to calls of methods are made by so many threads.
_CALLS_AT_ONCE = 4
# Callers whose turns are remembered between their submissions.
_MAX_CALLERS = 256


@dataclass(frozen=True, slots=True)
class Order:
    """What a replica is to be. settings: pickled ones of one engine. cores: those to stay on; none: wherever it is put."""

    settings: bytes
    cores: tuple[int, ...]
    warm_up: WarmUpLevel
    log_level: int


@dataclass(frozen=True, slots=True)
class RemoteFacts:
    """Facts without what works with the tokenizer here, and what there is of it. plugin: its `task`, and whether it merges."""

    facts: EngineFacts
    listwise: bool
    plugin: tuple[str | None, bool] | None


def main() -> NoReturn:
    """Serve the channel of that file descriptor until it ends, or until told to close."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        # They are meant for the process that started this one, and reach the whole group; that one says when it is over.
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    os.dup2(2, 1)  # standard output is the front end's, and may be data
    try:
        order: Order = channel.receive()
    except EOFError:
        os._exit(0)
    process.stay_on(order.cores)
    _Process(channel, order).run()


class _Process:
    """The engine of this process, and the threads around it."""

    def __init__(self, channel: Channel, order: Order) -> None:
        self.channel = channel
        self.order = order
        self.outbox = SimpleQueue[tuple[Any, ...] | None]()
        self.engine: Engine | None = None
        self.futures: dict[int, Future[Answer]] = {}
        self.callers: OrderedDict[int, Caller] = OrderedDict()
        self.calls = ThreadPoolExecutor(_CALLS_AT_ONCE, "poolhouse-call")
        self.closing = SimpleQueue[float]()

    def run(self) -> NoReturn:
        """Open the engine, answer, close."""
        _log_to(self.outbox, self.order.log_level)
        self.sender = threading.Thread(target=self._send, name="poolhouse-sender", daemon=True)
        self.sender.start()
        threading.Thread(target=self._read, name="poolhouse-reader", daemon=True).start()
        try:
            self._open()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the front end says it
            self.outbox.put(("unready", _as_sent(error), _is_of_memory(error)))
            self._end(1)
        seconds = self.closing.get()
        if self.engine is not None:
            self.engine.close(seconds)
        self._end(0)

    def _end(self, status: int) -> NoReturn:
        """Send what waits, and end without taking the interpreter down: threads may be inside torch."""
        self.outbox.put(None)
        self.sender.join(10)
        os._exit(status)

    def _open(self) -> None:
        try:
            settings: Settings = pickle.loads(self.order.settings)  # noqa: S301 - from our own other half
        except Exception as error:
            raise ConfigError(f"replicas: a function in hf_overrides must stand in a module: {error}") from error
        from poolhouse.engine.open import open_engine

        engine = open_engine(settings)
        engine.on_fatal(self._die)
        engine.warm_up(self.order.warm_up)
        # Models and modules stay: the garbage collector need not walk them again.
        gc.freeze()
        self.engine = engine
        self.outbox.put(("ready", _sendable(engine.facts)))

    def _die(self, error: EngineError) -> None:
        """The engine cannot go on: its requests go to another replica, and this process ends."""
        self.outbox.put(("dying", str(error)))
        self.outbox.put(None)
        self.sender.join(10)
        os._exit(1)

    # --- What comes ---

    def _read(self) -> None:
        try:
            while True:
                for item in self.channel.receive():
                    self._take(*item)
        except EOFError:
            os._exit(0)
        except BaseException as error:
            log.critical("A message could not be read: %s", error, exc_info=error)
            os._exit(1)

    def _take(self, kind: str, *values: Any) -> None:
        if kind == "run":
            self._submit(*values)
        elif kind == "cancel":
            for number in values[0]:
                future = self.futures.get(number)
                if future is not None:
                    future.cancel()
        elif kind == "call":
            self.calls.submit(self._call, *values)
        elif kind == "observe":
            self._engine.observe(_Observer(self.outbox) if values[0] else None)
        elif kind == "close":
            self.closing.put(values[0])

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None, "no message but the end comes before the engine is ready"
        return self.engine

    def _submit(self, key: int | None, numbers: Sequence[int], rows: Sequence[Row]) -> None:
        requests = [request_of(row) for row in rows]
        for number, request in zip(numbers, requests, strict=True):
            self.futures[number] = request.future
            request.future.add_done_callback(partial(self._done, number))
        self._engine.submit(requests, caller=None if key is None else self._caller(key))

    def _caller(self, key: int) -> Caller:
        caller = self.callers.pop(key, None) or Caller()
        self.callers[key] = caller
        while len(self.callers) > _MAX_CALLERS:
            self.callers.popitem(last=False)
        return caller

    def _done(self, number: int, future: Future[Answer]) -> None:
        self.futures.pop(number, None)
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self.outbox.put(("answer", number, future.result()))
        elif error is not self._engine.fatal:
            # Where the engine is lost, another replica answers.
            self.outbox.put(("failed", number, _as_sent(error)))

    def _call(self, number: int, path: str, arguments: tuple[Any, ...], rows: Sequence[Row] | None) -> None:
        """Call a method of the engine, or of its parts. rows: of requests, which are then its only argument."""
        try:
            found = attrgetter(path)(self._engine)
            if rows is not None:
                arguments = ([request_of(row) for row in rows],)
            result = found(*arguments) if callable(found) else found
            pickle.dumps(result, 5, buffer_callback=lambda _: None)
            self.outbox.put(("returned", number, result))
        except Exception as error:  # noqa: BLE001 - whoever asked raises it
            self.outbox.put(("raised", number, _as_sent(error)))

    # --- What goes ---

    def _send(self) -> None:
        """Send all that is there in one message, again and again; answers together."""
        for items in gathered(self.outbox):
            self._send_all(items)

    def _send_all(self, items: list[tuple[Any, ...]]) -> None:
        answers = [item for item in items if item[0] == "answer"]
        others = [item for item in items if item[0] != "answer"]
        if answers:
            numbers = [number for _, number, _ in answers]
            others.append(("answers", numbers, columns_of([answer for _, _, answer in answers])))
        try:
            self.channel.send(others)
        except OSError:
            os._exit(0)


class _Observer:
    """Tells the front end of the engine's work."""

    def __init__(self, outbox: SimpleQueue[tuple[Any, ...] | None]) -> None:
        self.outbox = outbox

    def tokenized(self, texts: int, seconds: float) -> None:
        self.outbox.put(("tokenized", texts, seconds))

    def ran(self, batch: BatchRun) -> None:
        self.outbox.put(("ran", batch))


def _sendable(facts: EngineFacts) -> RemoteFacts:
    plugin = facts.plugin
    told = None if plugin is None else (getattr(plugin, "task", None), hasattr(plugin, "merge_pooling_params"))
    return RemoteFacts(replace(facts, listwise=None, plugin=None), facts.listwise is not None, told)


def _as_sent(error: BaseException) -> BaseException:
    """The error, or one of ours with its words where it cannot be sent."""
    try:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:  # noqa: BLE001 - any error's own code runs here
        return EngineError(f"{type(error).__name__}: {error}")
    # A system exit of a library must not be raised in another process.
    return error if type(again) is type(error) and isinstance(error, Exception) else EngineError(repr(error))


def _is_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, by torch's errors of devices and CPUs, or by Python's own."""
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    )


class _Records(logging.Handler):
    """Gives what is logged here to the front end, which has the log."""

    def __init__(self, outbox: SimpleQueue[tuple[Any, ...] | None]) -> None:
        super().__init__()
        self.outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        self.outbox.put(("log", record.levelno, message))


class _Lines(io.TextIOBase):
    """A standard stream whose lines are logged: progress bars of libraries, mostly."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            # Of a progress bar, the last state counts.
            if last := line.rstrip("\r").rpartition("\r")[2].rstrip():
                log.info("%s", last)
        return len(text)


def _log_to(outbox: SimpleQueue[tuple[Any, ...] | None], level: int) -> None:
    """Let all that is logged, printed, warned of and raised by nobody's hand end in the log of the front end."""
    sys.stdout = sys.stderr = _Lines()
    logging.root.addHandler(_Records(outbox))
    logging.getLogger("poolhouse").setLevel(level)
    warnings.showwarning = lambda message, *_, **__: log.warning("%s", message)
    threading.excepthook = lambda raised: log.error("A thread ended: %s", raised.exc_value, exc_info=raised.exc_value)


if __name__ == "__main__":
    main()
