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
        self._lock = threading.Lock()

    def add(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self.count += len(requests)
        for request in requests:
            request.future.add_done_callback(self._one_done)

    def _one_done(self, _: Future[Answer]) -> None:
        with self._lock:
            self.count -= 1
