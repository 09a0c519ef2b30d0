"""Health: what ended an engine for good, and who is told of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

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
