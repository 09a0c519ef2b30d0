"""Media: the stage before intake in which the pictures of requests are fetched, decoded and made ready for the tower.

    requests ─► turns ─► room for their pixels ─► a job per picture ─► all pictures of a request ─► intake
                                                  fetched on an event loop, the rest in threads

One picture is processed once, however many prompts show it at a time: jobs of one submission share a source, and all share a
content. Text requests never come here.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from poolhouse.engine.queue import CallerQueue, Turns
from poolhouse.engine.request import Answer, Request, fail, start
from poolhouse.errors import EngineClosed, EngineError, InvalidRequest
from poolhouse.inputs.content import Image
from poolhouse.inputs.limits import too_many_tokens
from poolhouse.inputs.media.fetch import Fetcher, FetchPolicy, is_remote, read_local
from poolhouse.inputs.media.images import ImageLimits, decoded
from poolhouse.inputs.pictures import PictureReader
from poolhouse.inputs.prompts import images_of
from poolhouse.packing.tokens import Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

log = logging.getLogger("poolhouse")

GoOn = Callable[[Sequence[Request], Mapping[int, CallerQueue]], None]

# Requests that are begun at a time, of those whose pictures are here, and of those that wait for sources.
_LOCAL_AT_ONCE = 32
_REMOTE_AT_ONCE = 64
# Bytes of a processed picture before any was seen.
_USUAL_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """How pictures are loaded.

    max_pictures: of one prompt. processor: settings of the picture processor, beneath those of requests.
    waiting_bytes: processed pictures of requests that wait or run; further ones are not begun.
    cache_bytes: processed pictures that are kept for later requests.
    """

    policy: FetchPolicy = FetchPolicy()
    limits: ImageLimits = ImageLimits()
    threads: int = 2
    max_pictures: int | None = None
    processor: Mapping[str, object] = field(default_factory=dict)
    waiting_bytes: int = 512 * 1024 * 1024
    cache_bytes: int = 128 * 1024 * 1024


class Media:
    """Loads the pictures of requests, and lets these go on; safe from several threads at once.

    max_tokens: a prompt whose pictures alone have more is refused before the rest of them is loaded.
    """

    def __init__(self, reader: PictureReader, options: MediaOptions, max_tokens: int) -> None:
        self._reader, self._options, self._max_tokens = reader, options, max_tokens
        self._fetcher = Fetcher(options.policy)
        self._threads = ThreadPoolExecutor(options.threads, "poolhouse-media")
        self._cache = PictureCache(options.cache_bytes)
        self._lock = threading.Lock()
        # Slow sources take no places of pictures that are here.
        self._local, self._remote = _Lane(_LOCAL_AT_ONCE), _Lane(_REMOTE_AT_ONCE)
        # All that did not go on yet; jobs that make the picture of a content.
        self._open: set[_Showing] = set()
        self._making: dict[bytes, _Job] = {}
        self._room = _Room(options.waiting_bytes)
        self._closed = False

    def take(self, requests: Sequence[Request], queues: Mapping[int, CallerQueue], go_on: GoOn) -> Sequence[Request]:
        """Begin those that show pictures, and return the others.

        go_on: called with each once its pictures are there, in a thread of this stage; errors go to its future.
        """
        submission = _Submission(queues, go_on)
        others: list[Request] = []
        for request in requests:
            images = () if request.pictures else images_of(request.prompt)
            if not images:
                others.append(request)
                continue
            try:
                self._check_count(len(images))
            except InvalidRequest as error:
                fail(request.future, error)
                continue
            remote = any(is_remote(image.source) for image in images)
            lane = self._remote if remote else self._local
            submission.showings.append(_Showing(request, images, submission, lane))
        if not submission.showings:
            return others
        with self._lock:
            refused = self._closed
            if not refused:
                self._open.update(submission.showings)
                for lane in (self._local, self._remote):
                    lane.turns.add([showing for showing in submission.showings if showing.lane is lane], min(queues))
        for showing in submission.showings:
            if refused:
                fail(showing.request.future, _closed())
            showing.request.future.add_done_callback(partial(self._done, showing))
        submission.showings = []
        self._advance()
        return others

    def loaded(self, request: Request) -> Request:
        """A request with its pictures, loaded by the calling thread.

        Raises:
            InvalidRequest: for the first that cannot be.
        """
        if not (images := images_of(request.prompt)):
            return request
        self._check_count(len(images))
        pictures: list[Picture] = []
        for image in images:
            wish = _Wish.of(image, request, self._options.processor)
            fetched = self._fetcher.fetch(str(image.source), image.path) if is_remote(image.source) else None
            digest, picture = self._opened(wish, fetched)
            pictures.append(self._cache.get(digest) or self._made(wish, digest, picture))
        return replace(request, pictures=tuple(pictures))

    def close(self, error: EngineError | None = None) -> None:
        """Stop; what did not go on fails with this error, or is left where there is none. Closing again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            left = list(self._open)
        self._fetcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if error is not None:
            for showing in left:
                fail(showing.request.future, error)

    def _check_count(self, count: int) -> None:
        limits = [limit for limit in (self._options.max_pictures, self._reader.max_pictures) if limit is not None]
        if limits and count > min(limits):
            raise InvalidRequest(f"At most {min(limits)} image(s) may be provided in one prompt.", "image", count)

    def _advance(self) -> None:
        """Begin requests while there is room."""
        for lane in (self._local, self._remote):
            while (begun := self._next(lane)) is not None:
                showing, jobs = begun
                for job in jobs:
                    self._begin(job)
                if not showing.missing:
                    self._in_thread(partial(self._go_on, showing))

    def _next(self, lane: _Lane) -> tuple[_Showing, list[_Job]] | None:
        """The request that is begun next, and its new jobs; None where none waits or there is no room."""
        with self._lock:
            while not (self._closed or len(lane.begun) >= lane.at_once or self._room.is_full(lane is self._remote)):
                if (showing := lane.turns.next()) is None:
                    return None
                if not showing.request.future.done():
                    lane.begun.add(showing)
                    showing.reserved = self._room.reserve(len(showing.images), lane is self._remote)
                    return showing, self._jobs(showing)
            return None

    def _jobs(self, showing: _Showing) -> list[_Job]:
        """New jobs for those pictures that no job of the submission makes, or made."""
        new: list[_Job] = []
        submission = showing.submission
        for index, image in enumerate(showing.images):
            wish = _Wish.of(image, showing.request, self._options.processor)
            if (picture := submission.made.get(wish.key)) is not None:
                showing.pictures[index] = picture
                continue
            showing.missing += 1
            if (job := submission.jobs.get(wish.key)) is None:
                submission.jobs[wish.key] = job = _Job(wish, submission)
                new.append(job)
            job.users.append((showing, index))
        return new

    def _begin(self, job: _Job) -> None:
        image = job.wish.image
        if not is_remote(image.source):
            self._in_thread(partial(self._process, job))
            return
        job.fetched = self._fetcher.fetch(str(image.source), image.path)
        job.fetched.add_done_callback(lambda _: self._in_thread(partial(self._process, job)))

    def _in_thread(self, work: Callable[[], None]) -> None:
        # A stage that is being closed has no threads; `close` tells those that wait.
        with suppress(RuntimeError):
            self._threads.submit(work)

    def _process(self, job: _Job) -> None:
        """Make the picture of a job and of those that turned out to have the same content."""
        if not job.users:
            return
        digest = None
        try:
            digest, picture = self._opened(job.wish, job.fetched)
            with self._lock:
                maker = self._making.setdefault(digest, job)
                if maker is not job:
                    maker.twins.append(job)
                    return
            self._settle(job, digest, self._cache.get(digest) or self._made(job.wish, digest, picture))
        except InvalidRequest as error:
            self._settle(job, digest, error)
        except CancelledError:
            self._settle(job, digest, _closed())
        except BaseException as error:
            log.error("Loading a picture failed", exc_info=error)
            self._settle(job, digest, EngineError(f"Loading a picture failed: {type(error).__name__}"))

    def _opened(self, wish: _Wish, fetched: Future[bytes] | None) -> tuple[bytes, bytes | PILImage]:
        """What identifies the picture, by content and settings, and its file's bytes or, where there is no file, itself."""
        source, path = wish.image.source, wish.image.path
        if fetched is not None:
            source = fetched.result()
        elif isinstance(source, str | Path):
            source = read_local(source, path, self._options.policy, wish.any_file)
        if isinstance(source, bytes | bytearray | memoryview):
            data = bytes(source)
            return _digest(wish.options, b"file", data), data
        picture = decoded(source, path, self._options.limits)
        return _digest(wish.options, repr(picture.size).encode(), picture.tobytes()), picture

    def _made(self, wish: _Wish, digest: bytes, source: bytes | PILImage) -> Picture:
        """The picture, made for the tower."""
        path = wish.image.path
        picture = decoded(source, path, self._options.limits) if isinstance(source, bytes) else source
        try:
            made = self._reader.processor(picture, wish.options)
        except InvalidRequest as error:
            if error.parameter is not None:
                raise
            raise InvalidRequest(f"{path}: {error}", path, error.value) from error
        self._cache.put(digest, made)
        return made

    def _settle(self, job: _Job, digest: bytes | None, result: Picture | Exception) -> None:
        """Give all users of a job, and of its twins, their picture or the error."""
        failed: list[tuple[_Showing, Exception]] = []
        complete: list[_Showing] = []
        with self._lock:
            if digest is not None and self._making.get(digest) is job:
                del self._making[digest]
            for one in (job, *job.twins):
                one.forget()
                if isinstance(result, Picture):
                    one.submission.made[one.wish.key] = result
                users, one.users = one.users, []
                for showing, index in users:
                    showing.missing -= 1
                    if isinstance(result, Exception):
                        failed.append((showing, _at(result, job.wish.image.path, showing.images[index].path)))
                        continue
                    showing.pictures[index] = result
                    if sum(len(picture.ids) for picture in showing.pictures.values()) > self._max_tokens:
                        failed.append((showing, too_many_tokens(self._max_tokens, self._max_tokens + 1)))
                    elif not showing.missing:
                        complete.append(showing)
        for showing, error in failed:
            fail(showing.request.future, error)
        for showing in complete:
            self._go_on(showing)

    def _go_on(self, showing: _Showing) -> None:
        with self._lock:
            if showing not in showing.lane.begun:
                return
            self._open.discard(showing)
            showing.lane.begun.discard(showing)
            pictures = tuple(showing.pictures[index] for index in range(len(showing.images)))
            showing.pictures.clear()
            showing.held = self._room.hold(pictures)
            self._room.free(showing.reserved, showing.lane is self._remote)
        # From here on only the request that goes on has the pictures: a future keeps what it calls back.
        request = replace(showing.request, pictures=pictures)
        del pictures
        showing.submission.go_on([request], showing.submission.queues)
        self._advance()

    def _done(self, showing: _Showing, _: Future[Answer]) -> None:
        """The request has its answer or error, or was cancelled: forget it, and stop what only it waits for."""
        idle: list[_Job] = []
        with self._lock:
            waited = showing in self._open
            self._open.discard(showing)
            if showing in showing.lane.begun:
                showing.lane.begun.discard(showing)
                self._room.free(showing.reserved, showing.lane is self._remote)
                for job in list(showing.submission.jobs.values()):
                    job.users = [user for user in job.users if user[0] is not showing]
                    if not job.users:
                        job.forget()
                        idle.append(job)
            self._room.release(showing.held)
            showing.held = ()
            showing.pictures.clear()
        if waited and showing.request.future.cancelled():
            start(showing.request.future)
        for job in idle:
            if job.fetched is not None:
                job.fetched.cancel()
        self._advance()


class _Lane:
    """Requests that are begun in turn, so many at a time. begun: those that have not gone on."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.turns = Turns[_Showing]()
        self.begun: set[_Showing] = set()


@dataclass(slots=True, eq=False)
class _Submission:
    """The requests of one `submit` that show pictures.

    jobs: of its sources, while they are made. made: their pictures, as long as anybody has them.
    """

    queues: Mapping[int, CallerQueue]
    go_on: GoOn
    showings: list[_Showing] = field(default_factory=list)
    jobs: dict[_Key, _Job] = field(default_factory=dict)
    made: WeakValueDictionary[_Key, Picture] = field(default_factory=WeakValueDictionary)


@dataclass(slots=True, eq=False)
class _Showing:
    """A request whose pictures are not all there yet.

    pictures: those that are, by their index. missing: how many are not. reserved: bytes that it is expected to need.
    held: the pictures that it has gone on with, by id and bytes.
    """

    request: Request
    images: tuple[Image, ...]
    submission: _Submission
    lane: _Lane
    pictures: dict[int, Picture] = field(default_factory=dict)
    missing: int = 0
    reserved: int = 0
    held: Sequence[tuple[int, int]] = ()


# A URL, or the identity of another source; the settings; whether any file may be read.
_Key = tuple[str | int, str, bool]


@dataclass(frozen=True, slots=True, eq=False)
class _Wish:
    """A picture that is wanted. options: of the picture processor. any_file: whether a text may name any file."""

    image: Image
    options: Mapping[str, object]
    any_file: bool
    key: _Key

    @classmethod
    def of(cls, image: Image, request: Request, settings: Mapping[str, object]) -> _Wish:
        options = {**settings, **request.prompt.processor_options}
        source = str(image.source) if is_remote(image.source) else id(image.source)
        return cls(image, options, request.local_files, (source, repr(options), request.local_files))


@dataclass(slots=True, eq=False)
class _Job:
    """One picture on its way. users: who waits for it, and for which of its pictures. twins: jobs of the same content.

    A job without users is not among its submission's.
    """

    wish: _Wish
    submission: _Submission
    users: list[tuple[_Showing, int]] = field(default_factory=list)
    twins: list[_Job] = field(default_factory=list)
    fetched: Future[bytes] | None = None

    def forget(self) -> None:
        """Leave the submission's jobs."""
        if self.submission.jobs.get(self.wish.key) is self:
            del self.submission.jobs[self.wish.key]


class _Room:
    """Memory of processed pictures, each counted once; not safe by itself from several threads.

    What is held, or reserved for pictures that are here, is at most about `max_bytes`, and half of it more is reserved for
    those that are fetched.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0
        self._reserved = {False: 0, True: 0}
        self._holders: dict[int, int] = {}
        # A moving average of a picture's bytes.
        self._usual = float(_USUAL_BYTES)

    def is_full(self, remote: bool) -> bool:
        """Whether nothing more is to be begun. remote: of what is fetched first."""
        if remote:
            return self._held >= self._max_bytes or 2 * self._reserved[True] >= self._max_bytes
        return self._held + self._reserved[False] >= self._max_bytes

    def reserve(self, pictures: int, remote: bool) -> int:
        """Take room for so many pictures of the usual size; returns the bytes."""
        reserved = int(self._usual * pictures)
        self._reserved[remote] += reserved
        return reserved

    def free(self, reserved: int, remote: bool) -> None:
        """Give back what `reserve` took."""
        self._reserved[remote] -= reserved

    def hold(self, pictures: Sequence[Picture]) -> Sequence[tuple[int, int]]:
        """Take room for these; returns what `release` gives back."""
        held = [(id(picture), picture.nbytes) for picture in pictures]
        for key, size in held:
            holders = self._holders.get(key, 0)
            self._holders[key] = holders + 1
            self._held += 0 if holders else size
            self._usual += (size - self._usual) / 16
        return held

    def release(self, held: Sequence[tuple[int, int]]) -> None:
        for key, size in held:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._held -= size


class PictureCache:
    """Processed pictures by content and settings: those that anybody has, and the latest of at most `max_bytes` for longer."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._alive: WeakValueDictionary[bytes, Picture] = WeakValueDictionary()
        self._latest: OrderedDict[bytes, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> Picture | None:
        with self._lock:
            if digest in self._latest:
                self._latest.move_to_end(digest)
            return self._alive.get(digest)

    def put(self, digest: bytes, picture: Picture) -> None:
        with self._lock:
            self._alive[digest] = picture
            if picture.nbytes > self._max_bytes or digest in self._latest:
                return
            self._latest[digest] = picture
            self._bytes += picture.nbytes
            while self._bytes > self._max_bytes:
                _, oldest = self._latest.popitem(last=False)
                self._bytes -= oldest.nbytes


def _digest(options: Mapping[str, object], kind: bytes, data: bytes) -> bytes:
    digest = hashlib.blake2b(repr(sorted(options.items())).encode(), digest_size=32)
    digest.update(b"\0" + kind + b"\0")
    digest.update(data)
    return digest.digest()


def _at(error: Exception, made: str, asked: str) -> Exception:
    """The error for an item that shares the picture of another. made: the path that the error names."""
    if made == asked or not isinstance(error, InvalidRequest) or error.parameter != made:
        return error
    return type(error)(f"{asked}{str(error).removeprefix(made)}", asked, error.value)


def _closed() -> EngineClosed:
    return EngineClosed("The engine was shut down before it could answer.")
