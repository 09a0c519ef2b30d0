"""Replica: one process that runs the model, seen from the process that started it: its threads, its calls, its end."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

from poolhouse.engine.channel import Channel, answers_of, gathered, row_of
from poolhouse.engine.observing import BatchRun
from poolhouse.engine.replica_process import Order, RemoteFacts
from poolhouse.engine.request import Answer, Request, fail
from poolhouse.errors import EngineError, InvalidRequest

log = logging.getLogger("poolhouse")

_PROGRAM = "from poolhouse.engine.replica_process import main; main()"
# How long a process that has closed its end may take to be gone, before it is killed.
_SECONDS_TO_END = 10.0


class Listener(Protocol):
    """Is told, in the replica's reading thread, of what it did."""

    def answered(self, numbers: Sequence[int], answers: Sequence[Answer]) -> None: ...

    def failed(self, number: int, error: BaseException) -> None: ...

    def tokenized(self, texts: int, seconds: float) -> None: ...

    def ran(self, batch: BatchRun) -> None: ...

    def lost(self, replica: Replica) -> None:
        """Its process has ended, whyever; nothing more comes of it."""
        ...


class StartFailed(Exception):
    """A replica that did not become ready. error: why. of_memory: whether that is that memory ran out."""

    def __init__(self, error: BaseException, of_memory: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.of_memory = of_memory


class Replica:
    """One process, from its start to its end.

    number: that of its place among the replicas. load: an estimate of the tokens, and outstanding the number, of the
    requests that it has; both belong to who shares requests out. started: its facts once it is ready, or `StartFailed`.
    ended: why it ended, once it has.
    """

    def __init__(
        self,
        number: int,
        order: Order,
        environment: Mapping[str, str],
        listener: Listener,
        on_lost: Callable[[Replica], None],
    ) -> None:
        self.number = number
        self.load = self.outstanding = 0
        self.started: Future[RemoteFacts] = Future()
        self.ended: str | None = None
        self.born = time.monotonic()
        self._listener, self._on_lost = listener, on_lost
        self._dying: str | None = None
        self._outbox = SimpleQueue[tuple[Any, ...] | None]()
        self._calls: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(  # noqa: S603 - this very Python, and our own module
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                # What can be imported here can be there.
                env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.channel = Channel(ours)
        self._writer = threading.Thread(target=self._write, args=(order,), name=f"{self}-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name=f"{self}-reader", daemon=True)
        self._writer.start()
        self._reader.start()

    def __str__(self) -> str:
        return f"poolhouse-replica-{self.number}"

    @property
    def includes_this_thread(self) -> bool:
        """Whether the thread that calls this is one of its own."""
        return threading.current_thread() in (self._reader, self._writer)

    def run(self, caller: int | None, numbers: Sequence[int], requests: Sequence[Request]) -> None:
        """Let it answer requests; what cannot be sent fails. caller: whose turn they share, see `Caller.number`."""
        self._outbox.put(("run", caller, numbers, requests))

    def cancel(self, number: int) -> None:
        """Take a request out of its queue."""
        self._outbox.put(("cancel", [number]))

    def observe(self, whether: bool) -> None:
        """Have it tell of its work, or no longer."""
        self._outbox.put(("observe", whether))

    def call(self, path: str, *arguments: Any, requests: Sequence[Request] | None = None, seconds: float) -> Any:
        """What a method of its engine returns, or an attribute of it; the path begins at the engine.

        Raises:
            EngineError: it ended, or did not answer within these seconds. What the method raises.
        """
        number = next(self._numbers)
        returned: Future[Any] = Future()
        with self._lock:
            if self.ended is not None:
                raise EngineError(f"Replica {self.number} {self.ended}.")
            self._calls[number] = returned
        rows = None if requests is None else list(map(row_of, requests))
        self._outbox.put(("call", number, path, arguments, rows))
        try:
            return returned.result(seconds)
        except TimeoutError:
            raise EngineError(f"Replica {self.number} did not answer within {seconds:g} seconds.") from None
        finally:
            self._calls.pop(number, None)

    def close(self) -> None:
        """Let it end; what it has not answered fails there."""
        self._outbox.put(("close", 0.0))

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()

    def join(self, seconds: float) -> None:
        """Wait until its process and its threads have ended, and kill it where that takes longer than these seconds."""
        if self.includes_this_thread:
            return
        self._reader.join(seconds)
        if self._reader.is_alive():
            self.process.kill()
            self._reader.join(_SECONDS_TO_END)

    def abandon(self) -> None:
        """Of a process forked from the one that has it: let go of the channel, which is the other's."""
        self.channel.socket.close()

    def _read(self) -> None:
        try:
            while True:
                for item in self.channel.receive():
                    self._take(*item)
        except EOFError:
            pass
        except BaseException as error:
            log.error("What replica %d sent could not be read: %s", self.number, error, exc_info=error)
            self.process.kill()
        self._end()

    def _take(self, kind: str, *values: Any) -> None:
        if kind == "answers":
            numbers, columns = values
            self._listener.answered(numbers, answers_of(columns))
        elif kind == "failed":
            self._listener.failed(*values)
        elif kind == "tokenized":
            self._listener.tokenized(*values)
        elif kind == "ran":
            self._listener.ran(*values)
        elif kind == "returned":
            self._returned(values[0]).set_result(values[1])
        elif kind == "raised":
            self._returned(values[0]).set_exception(values[1])
        elif kind == "log":
            level, message = values
            log.log(level, "replica %d: %s", self.number, message)
        elif kind == "ready":
            self.started.set_result(values[0])
        elif kind == "unready":
            self.started.set_exception(StartFailed(*values))
        elif kind == "dying":
            self._dying = values[0]

    def _returned(self, number: int) -> Future[Any]:
        """Who waits for that call; nobody may, any more."""
        return self._calls.pop(number, None) or Future()

    def _end(self) -> None:
        """The process has closed its end: wait for it, and tell all who wait."""
        self.channel.end()
        try:
            status = self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._outbox.put(None)
        self._writer.join()
        self.channel.socket.close()
        reason = _reason(status) if self._dying is None else f"lost its engine: {self._dying}"
        with self._lock:
            self.ended = reason
            calls, self._calls = self._calls, {}
        for returned in calls.values():
            fail(returned, EngineError(f"Replica {self.number} {reason}."))
        if not self.started.done():
            # One that is killed without a word was mostly killed because memory ran out.
            error = EngineError(f"Replica {self.number} {reason} while it started; the log may say more.")
            self.started.set_exception(StartFailed(error, status == -signal.SIGKILL))
        self._listener.lost(self)
        self._on_lost(self)

    def _write(self, order: Order) -> None:
        """Send all that is there in one message, again and again."""
        try:
            self.channel.send(order)
            for items in gathered(self._outbox):
                self._send(items)
        except OSError:
            self.channel.end()

    def _send(self, items: list[tuple[Any, ...]]) -> None:
        try:
            self.channel.send([_with_rows(item) for item in items])
        except OSError:
            raise
        except Exception:  # noqa: BLE001 - whatever a caller's object does when it is pickled
            for item in items:
                self._send_what_can_be(item)

    def _send_what_can_be(self, item: tuple[Any, ...]) -> None:
        """Send one item by itself; of requests each by itself."""
        if item[0] == "run" and len(item[2]) > 1:
            _, caller, numbers, requests = item
            for number, request in zip(numbers, requests, strict=True):
                self._send_what_can_be(("run", caller, [number], [request]))
            return
        try:
            self.channel.send([_with_rows(item)])
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001
            refused = InvalidRequest(f"This cannot be sent to a replica: {error}", "prompt")
            if item[0] == "run":
                self._listener.failed(item[2][0], refused)
            elif item[0] == "call":
                fail(self._returned(item[1]), refused)


def _with_rows(item: tuple[Any, ...]) -> tuple[Any, ...]:
    """The item as it is sent."""
    return (*item[:3], list(map(row_of, item[3]))) if item[0] == "run" else item


def _reason(status: int) -> str:
    """How a process ended, by its status."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
