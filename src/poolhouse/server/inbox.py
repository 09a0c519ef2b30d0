"""Inbox: prompts of different connections that come in the same moment go to the engine together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from poolhouse.engine.request import Request


class Inbox:
    """Requests of one prompt, submitted in one call per turn of the event loop.

    A tokenizer call for many short texts costs little more than one for a single text, and so does waking the engine.
    """

    def __init__(self, submit: Callable[[Sequence[Request]], object]) -> None:
        self.submit = submit
        self._requests: list[Request] = []

    def put(self, request: Request) -> None:
        """Submit the request before the loop's next turn."""
        if not self._requests:
            asyncio.get_running_loop().call_soon(self._submit)
        self._requests.append(request)

    def _submit(self) -> None:
        requests, self._requests = self._requests, []
        self.submit(requests)
