"""Waiting: many futures at once from a coroutine, and errors that name the prompt they are about."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress

from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest


def prompt_path(index: int) -> str:
    """How errors name the prompt of a request to callers of Python."""
    return f"prompts[{index}]"


async def gather(futures: Sequence[Future[Answer]], path: Callable[[int], str] = prompt_path) -> list[Answer]:
    """All answers in order; the first failure, in order, is raised, with the path of its prompt.

    Cancelling takes what still waits out of the queue.
    """
    try:
        return await all_results(futures)
    except BaseException as error:
        for future in futures:
            future.cancel()
        if isinstance(error, InvalidRequest):
            raise with_path(error, futures, path) from None
        raise


def all_results(futures: Sequence[Future[Answer]]) -> asyncio.Future[list[Answer]]:
    """One future of the running loop for all of these: their results in order, or the first failure, in order."""
    loop = asyncio.get_running_loop()
    whole: asyncio.Future[list[Answer]] = loop.create_future()
    mailbox = _mailbox(loop)
    missing = itertools.count(len(futures) - 1, -1)
    waiting = list(futures)

    def resolve() -> None:
        try:
            if not whole.done():
                whole.set_result([future.result() for future in waiting])
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the whole's error
            whole.set_exception(error)
        finally:
            # A future keeps what it calls back, and one of them would keep all answers.
            waiting.clear()

    def one_done(_: Future[Answer]) -> None:
        if next(missing) == 0:
            mailbox.post(resolve)

    for future in futures:
        future.add_done_callback(one_done)
    if not futures:
        whole.set_result([])
    return whole


def with_path(
    error: InvalidRequest, futures: Sequence[Future[Answer]], path: Callable[[int], str], several: bool | None = None
) -> InvalidRequest:
    """The error with the path of the prompt that has it, where there are several and it does not say so itself.

    several: whether there are; None: whether these are several.
    """
    several = len(futures) > 1 if several is None else several
    for index, future in enumerate(futures if several else ()):
        if future.done() and not future.cancelled() and future.exception() is error:
            where = path(index)
            named = str(error).startswith(where)
            return error if named else type(error)(f"{where}: {error}", error.parameter, error.value)
    return error


class _Mailbox:
    """Calls for one loop from other threads; the loop is woken once for all that come together.

    Waking it takes a system call, and a batch resolves dozens of requests at once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Weak, since the table of mailboxes would keep every loop otherwise.
        self._loop = weakref.ref(loop)
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def post(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        if not self._woken:
            self._woken = True
            loop = self._loop()
            # A loop may end while a batch runs whose callers were cancelled; then nobody waits.
            with suppress(RuntimeError):
                if loop is not None:
                    loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        # Before the calls: what is posted from here on wakes the loop again.
        self._woken = False
        while self._calls:
            self._calls.popleft()()


_MAILBOXES: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()


def _mailbox(loop: asyncio.AbstractEventLoop) -> _Mailbox:
    mailbox = _MAILBOXES.get(loop)
    if mailbox is None:
        mailbox = _MAILBOXES[loop] = _Mailbox(loop)
    return mailbox
