"""Store: uploaded files and batches in one folder, which goes on with them after a restart.

folder/
    lock                       held by the one server that uses the folder
    files/file-ID              the content; file-ID.json says what it is
    batches/batch_ID.json      the batch as clients see it, and the files that it writes
    batches/batch_ID.journal   how far it is; gone when it ends
    batches/batch_ID.answers   what becomes the output file, and .errors what becomes the error file
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import orjson
from starlette.types import ASGIApp

from poolhouse.errors import ConfigError, EngineError, InvalidRequest
from poolhouse.files import whole_file
from poolhouse.journal import JournalFile, hold
from poolhouse.server.batches.lines import Reader, Requester, custom_id_of, refusal
from poolhouse.server.batches.run import Files, Point, in_thread, run
from poolhouse.server.wire.errors import NoRoute
from poolhouse.settings import ServerSettings

log = logging.getLogger("poolhouse")

JsonObject = dict[str, Any]
# Batches that run at a time; others wait for their turn, in order.
_AT_ONCE = 2
# Between two looks for files whose time is over.
_SECONDS_BETWEEN_SWEEPS = 60.0
_IDS = re.compile(r"(file-|batch_)[0-9a-f]{24}")
_UNDER_WAY = ("validating", "in_progress", "finalizing", "cancelling")


class NotFound(NoRoute):
    """There is no file or batch of this id."""


class Store:
    """The files and batches of a server.

    app: answers the requests of batches; set before `start`. alive: whether engines can answer.
    """

    app: ASGIApp

    def __init__(self, folder: Path, settings: ServerSettings, alive: Callable[[], bool]) -> None:
        self.folder, self.settings = folder, settings
        self._alive = alive
        self._files: dict[str, JsonObject] = {}
        self._batches: dict[str, JsonObject] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._sweeper: asyncio.Task[None] | None = None
        check(folder)
        self._lock: IO[bytes] = (folder / "lock").open("ab")
        hold(self._lock, folder)

    async def start(self) -> None:
        """Go on with what the folder holds; does nothing where it was started.

        Raises:
            ConfigError: it holds what cannot be read.
        """
        if self._sweeper is not None:
            return
        for part in self.folder.glob("*/.*"):
            part.unlink(missing_ok=True)
        self._files = {one["id"]: one for one in _read(self.folder / "files", lambda one: one)}
        self._batches = {one["batch"]["id"]: one for one in _read(self.folder / "batches", lambda one: one["batch"])}
        self._sweeper = asyncio.create_task(self._sweep())
        for batch_id, kept in self._batches.items():
            if kept["batch"]["status"] in _UNDER_WAY:
                self._begin(batch_id)
        await asyncio.sleep(0)

    async def stop(self) -> None:
        """Leave all batches where they are, for the next start."""
        tasks = [*self._tasks.values(), *([] if self._sweeper is None else [self._sweeper])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lock.close()

    # Files.

    @asynccontextmanager
    async def upload(self) -> AsyncIterator[tuple[str, Path]]:
        """The id of a new file, and where its content is to be written; what is not kept is removed."""
        await self.start()
        file_id = _new("file-")
        part = self.folder / "files" / f".{file_id}"
        try:
            yield file_id, part
        finally:
            part.unlink(missing_ok=True)

    def keep(self, file_id: str, part: Path, filename: str, purpose: str, seconds: int | None) -> JsonObject:
        """A file that is written, as clients see it. seconds: after which it is removed; None: never."""
        now = int(time.time())
        about = {
            "id": file_id,
            "object": "file",
            "bytes": part.stat().st_size,
            "created_at": now,
            "expires_at": None if seconds is None else now + seconds,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
        }
        part.replace(self.content(file_id))
        _write(self.folder / "files" / f"{file_id}.json", about)
        self._files[file_id] = about
        return about

    async def files(self) -> list[JsonObject]:
        """All files, the newest first."""
        await self.start()
        return list(self._files.values())[::-1]

    async def file(self, file_id: str) -> JsonObject:
        """A file.

        Raises:
            NotFound: there is none of this id.
        """
        await self.start()
        return _found(self._files, file_id, "file")

    def content(self, file_id: str) -> Path:
        """Where the content of a file is."""
        return self.folder / "files" / file_id

    async def delete(self, file_id: str) -> None:
        """Remove a file.

        Raises:
            NotFound: there is none. InvalidRequest: a batch reads it.
        """
        await self.file(file_id)
        for kept in self._batches.values():
            batch = kept["batch"]
            if batch["input_file_id"] == file_id and batch["status"] in _UNDER_WAY:
                raise InvalidRequest(f"{file_id} is read by {batch['id']}; cancel that first.", "file_id", file_id)
        self._remove(file_id)

    def _remove(self, file_id: str) -> None:
        # First what says that it is there.
        (self.folder / "files" / f"{file_id}.json").unlink(missing_ok=True)
        self.content(file_id).unlink(missing_ok=True)
        self._files.pop(file_id, None)

    async def _sweep(self) -> None:
        while True:
            now = time.time()
            used = {
                kept["batch"]["input_file_id"]
                for kept in self._batches.values()
                if kept["batch"]["status"] in _UNDER_WAY
            }
            for file_id, about in list(self._files.items()):
                if about["expires_at"] is not None and about["expires_at"] <= now and file_id not in used:
                    self._remove(file_id)
            await asyncio.sleep(_SECONDS_BETWEEN_SWEEPS)

    # Batches.

    async def create(
        self,
        input_file: str,
        endpoint: str,
        window: tuple[str, int],
        metadata: Mapping[str, str] | None,
        output_seconds: int | None,
    ) -> JsonObject:
        """A new batch, which begins when its turn comes. window: in which it is to end, as written and in seconds.

        Raises:
            NotFound: no such file.
        """
        await self.file(input_file)
        now = int(time.time())
        states = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        batch: JsonObject = {
            "id": _new("batch_"),
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_file,
            "completion_window": window[0],
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + window[1],
            **{f"{state}_at": None for state in states},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": None if metadata is None else dict(metadata),
        }
        kept = {"batch": batch, "answers": _new("file-"), "errors": _new("file-"), "output_seconds": output_seconds}
        self._batches[batch["id"]] = kept
        self._save(batch["id"])
        self._begin(batch["id"])
        # It has begun, so that it can be cancelled.
        await asyncio.sleep(0)
        return batch

    async def batches(self) -> list[JsonObject]:
        """All batches, the newest first."""
        await self.start()
        return [kept["batch"] for kept in self._batches.values()][::-1]

    async def batch(self, batch_id: str) -> JsonObject:
        """A batch.

        Raises:
            NotFound: there is none of this id.
        """
        await self.start()
        batch: JsonObject = _found(self._batches, batch_id, "batch")["batch"]
        return batch

    async def cancel(self, batch_id: str) -> JsonObject:
        """Let a batch end now; what is answered becomes its output.

        Raises:
            NotFound: there is none of this id. InvalidRequest: it has ended.
        """
        batch = await self.batch(batch_id)
        if batch["status"] not in _UNDER_WAY:
            raise InvalidRequest(f"{batch_id} cannot be cancelled: it is {batch['status']}.", "batch_id", batch_id)
        if batch["status"] in ("validating", "in_progress"):
            self._enter(batch_id, "cancelling")
            self._tasks[batch_id].cancel()
        return batch

    def _begin(self, batch_id: str) -> None:
        self._tasks[batch_id] = asyncio.create_task(self._to_its_end(batch_id))

    async def _to_its_end(self, batch_id: str) -> None:
        """Take a batch from wherever it is to its end."""
        batch = self._batches[batch_id]["batch"]
        try:
            if batch["status"] in ("validating", "in_progress"):
                await self._within_its_time(batch_id)
            if batch["status"] != "failed":
                await in_thread(partial(self._finish, batch_id))
        except EngineError as error:
            log.error("%s waits for the next start of the server: %s", batch_id, error)
        except OSError as error:
            log.error("%s failed: %s", batch_id, error)
            self._fail(batch_id, "storage", f"The server could not read or write a file: {error.strerror or error}.")
        except Exception:
            log.exception("%s failed", batch_id)
            self._fail(batch_id, "server_error", "The server failed on this batch; its log says why.")
        finally:
            self._tasks.pop(batch_id, None)

    async def _within_its_time(self, batch_id: str) -> None:
        """Answer its requests, until it ends, is cancelled or expires."""
        batch = self._batches[batch_id]["batch"]
        try:
            async with asyncio.timeout(max(0.0, batch["expires_at"] - time.time())), self._turns:
                await self._run(batch_id)
        except TimeoutError:
            await in_thread(partial(self._expire, batch_id))
        except asyncio.CancelledError:
            # Otherwise the server stops.
            if batch["status"] != "cancelling":
                raise

    async def _run(self, batch_id: str) -> None:
        kept = self._batches[batch_id]
        batch = kept["batch"]
        source = self.content(batch["input_file_id"])
        if batch["status"] == "validating":
            total = await asyncio.to_thread(_count, source, self.settings.max_body_bytes)
            if not total:
                self._fail(batch_id, "empty_file", "The input file holds no line.")
                return
            batch["request_counts"]["total"] = total
            self._enter(batch_id, "in_progress")

        def tell(point: Point) -> None:
            batch["request_counts"].update(completed=point.completed, failed=point.failed)

        requester = Requester(self.app, self._alive, batch["endpoint"])
        with self._opened(batch_id) as sink, source.open("rb") as stream:
            tell(sink.point)
            await run(stream, self.settings.max_body_bytes, requester.reply, sink, tell)

    def _opened(self, batch_id: str) -> Files:
        journal = JournalFile(self._path(batch_id, "journal"))
        return Files(journal, {"batch": batch_id}, self._path(batch_id, "answers"), self._path(batch_id, "errors"))

    def _expire(self, batch_id: str) -> None:
        """Say of each request that is left that its time is over."""
        batch = self._batches[batch_id]["batch"]
        source = self.content(batch["input_file_id"])
        message = "This request was not answered before the batch's completion window ended."
        with self._opened(batch_id) as sink, source.open("rb") as stream:
            reader = Reader(stream, sink.point.read, sink.point.lines, self.settings.max_body_bytes)
            while lines := reader.some():
                for line in lines:
                    sink.write(refusal("batch_expired", message, custom_id_of(line)))
                    sink.point.read, sink.point.lines = line.end, line.number
                    sink.point.failed += 1
            sink.settle()
            counts = {"completed": sink.point.completed, "failed": sink.point.failed, "total": sink.point.total}
        batch["request_counts"].update(counts)
        batch["expired_at"] = int(time.time())
        self._save(batch_id)

    def _finish(self, batch_id: str) -> None:
        """Make files of what is written; done again from its beginning where it was stopped."""
        kept = self._batches[batch_id]
        batch = kept["batch"]
        if batch["status"] == "in_progress":
            self._enter(batch_id, "finalizing")
        if self._path(batch_id, "journal").exists():
            # To what the journal says, where a killed process wrote more.
            with self._opened(batch_id) as sink:
                batch["request_counts"].update(completed=sink.point.completed, failed=sink.point.failed)
        for kind, name in (("answers", "output"), ("errors", "error")):
            file_id, part = kept[kind], self._path(batch_id, kind)
            if part.exists() and part.stat().st_size:
                self.keep(file_id, part, f"{batch_id}_{name}.jsonl", "batch_output", kept["output_seconds"])
            if file_id in self._files:
                batch[f"{name}_file_id"] = file_id
        cancelled = batch["status"] == "cancelling"
        self._enter(batch_id, "cancelled" if cancelled else "expired" if batch["expired_at"] else "completed")
        self._clear(batch_id)

    def _fail(self, batch_id: str, code: str, message: str) -> None:
        error = {"code": code, "line": None, "message": message, "param": None}
        self._batches[batch_id]["batch"]["errors"] = {"object": "list", "data": [error]}
        with suppress(OSError):
            self._enter(batch_id, "failed")
            self._clear(batch_id)

    def _clear(self, batch_id: str) -> None:
        for kind in ("journal", "answers", "errors"):
            self._path(batch_id, kind).unlink(missing_ok=True)

    def _enter(self, batch_id: str, status: str) -> None:
        batch = self._batches[batch_id]["batch"]
        batch["status"] = status
        batch[f"{status}_at"] = batch[f"{status}_at"] or int(time.time())
        self._save(batch_id)

    def _save(self, batch_id: str) -> None:
        _write(self._path(batch_id, "json"), self._batches[batch_id])

    def _path(self, batch_id: str, kind: str) -> Path:
        return self.folder / "batches" / f"{batch_id}.{kind}"


def check(folder: Path) -> None:
    """Make the folder where there is none.

    Raises:
        ConfigError: it cannot be used, or the parser of uploads is not installed.
    """
    try:
        import python_multipart  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--batch-dir needs python-multipart, which is not installed: pip install 'poolhouse[batches]'."
        ) from None
    try:
        for name in ("files", "batches"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("ab"):
            pass
    except OSError as error:
        raise ConfigError(f"--batch-dir {folder} cannot be used: {error.strerror}.") from None


def _new(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def _found(known: Mapping[str, JsonObject], name: str, what: str) -> JsonObject:
    if name not in known:
        raise NotFound(f"There is no {what} {name[:60]!r}.")
    return known[name]


def _read(folder: Path, public: Callable[[JsonObject], JsonObject]) -> list[JsonObject]:
    """What the JSON files of a folder say, the oldest first. public: the part of it that clients see."""
    found: list[JsonObject] = []
    for path in folder.glob("*.json"):
        if _IDS.fullmatch(path.stem):
            try:
                found.append(orjson.loads(path.read_bytes()))
            except orjson.JSONDecodeError as error:
                raise ConfigError(f"{path} cannot be read: {error}.") from None
    return sorted(found, key=lambda one: (public(one)["created_at"], public(one)["id"]))


def _write(path: Path, value: JsonObject) -> None:
    with whole_file(path) as part:
        part.write_bytes(orjson.dumps(value))


def _count(path: Path, longest: int) -> int:
    """The lines that are requests."""
    with path.open("rb") as stream:
        reader, count = Reader(stream, 0, 0, longest), 0
        while lines := reader.some():
            count += len(lines)
    return count
