"""Pending: how many accepted requests have no answer yet."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

from poolhouse.engine.request import Answer, Request


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
