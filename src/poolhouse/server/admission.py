"""Admission: how many prompts may wait, and when to come again where that is too many."""

from __future__ import annotations

import time

from poolhouse.server.errors import Overloaded

# Of the rate at which prompts are answered, which tells how long the queue is in seconds.
_HALF_LIFE_SECONDS = 10.0
_LONGEST_RETRY_SECONDS = 60.0


class Admission:
    """Counts the prompts that were accepted and not yet answered; belongs to one event loop.

    most: prompts at once. A request of any size is taken while nothing waits.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.waiting = 0
        self._rate = 0.0
        self._seen = time.monotonic()

    def enter(self, prompts: int) -> None:
        """Accept that many prompts.

        Raises:
            Overloaded: too many wait already.
        """
        if self.waiting and self.waiting + prompts > self.most:
            raise Overloaded(
                f"The server is overloaded: {self.waiting} prompts wait, and {self.most} may. Come again later.",
                self._retry_after(prompts),
            )
        self.waiting += prompts

    def leave(self, prompts: int) -> None:
        """That many are answered, or wait no longer."""
        self.waiting -= prompts
        now = time.monotonic()
        passed = max(now - self._seen, 1e-6)
        self._seen = now
        kept: float = 0.5 ** (passed / _HALF_LIFE_SECONDS)
        self._rate = kept * self._rate + (1 - kept) * prompts / passed

    def _retry_after(self, prompts: int) -> float:
        """Seconds until there should be room, at the rate of the last while."""
        too_many = self.waiting + prompts - self.most
        return min(too_many / self._rate if self._rate else 1.0, _LONGEST_RETRY_SECONDS)
