"""Engines and forks.

Threads do not live on in a forked process, and a lock that one of them held is held there for ever. So a fork waits for
the batches that run, the child drops all that was shared with threads, and starts threads of its own when it is first
asked. The weights are the parent's, shared with it.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

# A fork waits for running batches no longer than this. Its child may then hang in the middle of a matrix library.
_LONGEST_WAIT = 20.0


class Forkable(Protocol):
    """What has threads that compute."""

    def hold(self, deadline: float) -> Callable[[], None]:
        """Keep its threads from computing, waiting until `deadline` (by `time.monotonic`); answers with what ends it."""
        ...

    def forked(self) -> None:
        """This process is a child of the one that had the threads."""
        ...


_everybody: weakref.WeakSet[Forkable] = weakref.WeakSet()
# Of threads that fork at the same time, those of each.
_held = threading.local()


def watch(one: Forkable) -> None:
    """Tell it of forks, as long as it lives."""
    _everybody.add(one)


def _before() -> None:
    deadline = time.monotonic() + _LONGEST_WAIT
    _held.releases = [one.hold(deadline) for one in list(_everybody)]


def _in_parent() -> None:
    for release in _held.__dict__.pop("releases", ()):
        release()


def _in_child() -> None:
    _held.__dict__.clear()
    everybody = list(_everybody)
    for one in everybody:
        one.forked()
    if everybody and "TOKENIZERS_PARALLELISM" in os.environ:
        # The tokenizers' own threads are gone too. Where the variable is not set, the library sees to it itself.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
