"""Inbox: prompts of different connections that come in the same moment go to the engine together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from poolhouse.engine.request import Request


class Submitter(Protocol):
    """What an engine must have."""

    def submit(self, requests: Sequence[Request]) -> object: ...


class Inbox:
    """Requests of one prompt, submitted in one call per turn of the event loop.

    A tokenizer call for many short texts costs little more than one for a single text, and so does waking the engine.
    """

    def __init__(self, engine: Submitter) -> None:
        self.engine = engine
        self._requests: list[Request] = []

    def put(self, request: Request) -> None:
        """Submit the request before the loop's next turn."""
        if not self._requests:
            asyncio.get_running_loop().call_soon(self._submit)
        self._requests.append(request)

    def _submit(self) -> None:
        requests, self._requests = self._requests, []
        submit(self.engine, requests)


def submit(engine: Submitter, requests: Sequence[Request]) -> None:
    """Start work on requests; whatever goes wrong, their futures tell."""
    # A signal would not be raised here: it is the tokenizer's, and the futures say so.
    with suppress(KeyboardInterrupt, SystemExit):
        engine.submit(requests)
