"""Health: what ended an engine for good and who is told of it, and how many requests have no answer yet."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from poolhouse.engine.request import Answer, Request
from poolhouse.errors import EngineError

log = logging.getLogger("poolhouse")


class Faults:
    """The fatal error of an engine, once it has one (the first stays), and the callbacks for it."""

    def __init__(self) -> None:
        self.fatal: EngineError | None = None
        self._callbacks: list[Callable[[EngineError], None]] = []
        self._lock = threading.Lock()

    def on_fatal(self, callback: Callable[[EngineError], None]) -> None:
        """Call back when the engine dies, at once if it is dead."""
        with self._lock:
            if self.fatal is None:
                self._callbacks.append(callback)
                return
        _call(callback, self.fatal)

    def die(self, error: EngineError) -> None:
        """Note what the engine died of, so that nothing more is accepted."""
        self.fatal = self.fatal or error

    def notify(self) -> None:
        """Call all callbacks, once; to be called when the requests that waited have their error."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            _call(callback, self.fatal)


def _call(callback: Callable[[EngineError], None], error: EngineError | None) -> None:
    assert error is not None
    try:
        callback(error)
    except Exception as failure:
        log.exception("A callback for the engine's end failed: %s", failure)


class Pending:
    """Counts requests from their acceptance until their futures are done, whichever way."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def add(self, requests: Sequence[Request]) -> None:
        with self._changed:
            self.count += len(requests)
        for request in requests:
            request.future.add_done_callback(self._one_done)

    def wait(self, seconds: float) -> None:
        """Wait until there are none, for at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self.count == 0, seconds)

    def _one_done(self, _: Future[Answer]) -> None:
        with self._changed:
            self.count -= 1
            if self.count == 0:
                self._changed.notify_all()
