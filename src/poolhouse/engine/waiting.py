"""Waiting for many futures at once from a coroutine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import Future

from poolhouse.engine.request import Answer


async def gather(futures: Sequence[Future[Answer]]) -> list[Answer]:
    """All answers in order; the first failure, in order, is raised.

    The loop is woken once, by the last future. Cancelling takes what still waits out of the queue.
    """
    loop = asyncio.get_running_loop()
    finished = loop.create_future()
    missing = itertools.count(len(futures) - 1, -1)

    def wake() -> None:
        if not finished.done():
            finished.set_result(None)

    def one_done(_: Future[Answer]) -> None:
        if next(missing) == 0:
            loop.call_soon_threadsafe(wake)

    try:
        for future in futures:
            future.add_done_callback(one_done)
        await finished
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise
