"""Run: a batch file from its first line to its last, or from where it was stopped, in order and in bounded memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol

from poolhouse.journal import JournalFile
from poolhouse.server.batches.lines import Line, Reader, Reply

# Most requests in flight, how many at first, and what lines and replies may take in memory together.
_IN_FLIGHT, _AT_FIRST = 256, 16
_BYTES = 128 * 1024 * 1024
# Between two points of a journal.
_SECONDS = 1.0


@dataclass(slots=True)
class Point:
    """How far a batch is: bytes and lines that were read, bytes that were written, and what came of the requests."""

    read: int = 0
    lines: int = 0
    answers: int = 0
    errors: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        """How many requests are answered."""
        return self.completed + self.failed


class Sink(Protocol):
    """Where replies go. point: how far that is."""

    point: Point

    def write(self, reply: Reply) -> None: ...

    def settle(self) -> None:
        """Let a killed batch go on from here."""
        ...


class Stream:
    """A pipe, of which nothing is remembered."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.point = Point()
        self._stream = stream

    def write(self, reply: Reply) -> None:
        self._stream.write(reply.line)

    def settle(self) -> None:
        self._stream.flush()


class Files:
    """A file of answers and one of errors, which may be the same; they are cut to what the journal's last point says.

    head: the first line of the journal, where it is new.
    """

    def __init__(
        self, journal: JournalFile, head: dict[str, object], answers: Path, errors: Path | None = None
    ) -> None:
        with ExitStack() as stack:
            stack.callback(journal.close)
            if not journal.entries:
                journal.append(head)
            points = [entry["point"] for entry in journal.entries if "point" in entry]
            self.point = Point(**points[-1]) if points else Point()
            self._journal = journal
            self._answers = stack.enter_context(_cut(answers, self.point.answers))
            self._errors = None if errors is None else stack.enter_context(_cut(errors, self.point.errors))
            self._stack = stack.pop_all()

    def write(self, reply: Reply) -> None:
        if self._errors is None or reply.answered:
            self._answers.write(reply.line)
            self.point.answers += len(reply.line)
        else:
            self._errors.write(reply.line)
            self.point.errors += len(reply.line)

    def settle(self) -> None:
        for stream in (self._answers, self._errors):
            if stream is not None:
                stream.flush()
                os.fsync(stream.fileno())
        self._journal.append({"point": asdict(self.point)})

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _cut(path: Path, size: int) -> IO[bytes]:
    """A file to write on, without what stands behind so many bytes.

    Raises:
        OSError: it is shorter.
    """
    stream = path.open("ab")
    if stream.tell() < size:
        stream.close()
        raise OSError(f"{path} is shorter than its journal says; remove the journal to begin anew.")
    stream.truncate(size)
    return stream


Answer = Callable[[Line], Awaitable[Reply]]


async def run(
    source: IO[bytes], longest: int, answer: Answer, sink: Sink, tell: Callable[[Point], None] = lambda _: None
) -> None:
    """Answer each line that is not answered yet, and write the replies in order.

    longest: bytes of a body. tell: hears of each group that is written. Whatever ends it, what was written is settled.

    Raises:
        OSError: nothing can be read or written. Otherwise what `answer` raises.
    """
    point = sink.point
    reader = Reader(source, point.read, point.lines, longest)
    window = _Window(answer)
    unread: deque[Line] = deque()
    ended, settled = False, time.monotonic()
    try:
        while True:
            while window.has_room and not ended:
                if not unread:
                    unread.extend(reader.some())
                    ended = not unread
                else:
                    window.start(unread.popleft())
            if not window:
                break
            for line, reply in await window.finished():
                sink.write(reply)
                point.read, point.lines = line.end, line.number
                point.completed += reply.answered
                point.failed += not reply.answered
            tell(point)
            if time.monotonic() - settled > _SECONDS:
                await in_thread(sink.settle)
                settled = time.monotonic()
    finally:
        await window.leave()
        sink.settle()


async def in_thread(work: Callable[[], None]) -> None:
    """Run what waits for a disk, to its end, also where the caller is cancelled."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class _Window:
    """Lines whose replies are not written yet, in order.

    There are few at first, and more with each reply, as far as memory allows by the largest one so far.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._tasks: deque[tuple[Line, asyncio.Task[Reply]]] = deque()
        self._most = _AT_FIRST
        self._bytes = self._largest = 0

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def has_room(self) -> bool:
        """Whether one more may be in flight; one always may."""
        return not self._tasks or (
            len(self._tasks) < self._most and self._bytes + len(self._tasks) * self._largest < _BYTES
        )

    def start(self, line: Line) -> None:
        self._bytes += len(line.raw or b"")
        self._tasks.append((line, asyncio.ensure_future(self._answer(line))))

    async def finished(self) -> list[tuple[Line, Reply]]:
        """The first ones, at least one; waits for that."""
        await asyncio.wait([self._tasks[0][1]])
        found: list[tuple[Line, Reply]] = []
        while self._tasks and self._tasks[0][1].done():
            line, task = self._tasks[0]
            reply = task.result()
            self._tasks.popleft()
            self._bytes -= len(line.raw or b"")
            self._largest = max(self._largest, len(reply.line))
            self._most = min(self._most + 1, _IN_FLIGHT)
            found.append((line, reply))
        return found

    async def leave(self) -> None:
        """Cancel what is in flight."""
        tasks = [task for _, task in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
