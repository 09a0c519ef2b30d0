"""Batches: OpenAI's /v1/files and /v1/batches, for files of requests to any route of this server that takes POST."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse, Response
from typing_extensions import TypedDict

from poolhouse.errors import InvalidRequest, did_you_mean
from poolhouse.server.batches.lines import NOT_FOR_LINES
from poolhouse.server.batches.store import NotFound, Store
from poolhouse.server.call import Call, as_json
from poolhouse.server.dialects._fields import Nested, Strict
from poolhouse.server.routing import Dialect, Route, endpoints
from poolhouse.server.wire.contract import Errors
from poolhouse.server.wire.errors import Disconnected, Refused, WrongContentType

T = TypeVar("T")

_OFF = "Files and batches are off on this server: --batch-dir FOLDER turns them on."
# A field of a form beside its file, and the name of that file.
_FIELD_BYTES, _NAME_BYTES = 4096, 255
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DAYS_30 = 30 * 86400


class UploadFields(BaseModel):
    """The form of POST /v1/files."""

    model_config = ConfigDict(populate_by_name=True)

    file: Annotated[str, Field(description="JSON lines: requests.", json_schema_extra={"format": "binary"})]
    purpose: Literal["batch"]
    expires_after_anchor: Literal["created_at"] | None = Field(None, alias="expires_after[anchor]")
    expires_after_seconds: int | None = Field(
        None,
        alias="expires_after[seconds]",
        ge=3600,
        le=_DAYS_30,
        description="After which it is removed; none: never.",
    )


class ExpiresAfter(Nested):
    """When files are removed."""

    model_config = ConfigDict(strict=True)

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=_DAYS_30)


class BatchFields(Strict):
    """The body of POST /v1/batches."""

    input_file_id: str = Field(description="An uploaded file.")
    endpoint: str = Field(description="The route that all lines ask, such as /v1/embeddings.")
    completion_window: str = Field(
        "24h",
        pattern=r"^[1-9][0-9]{0,5}[smhd]$",
        description="What is not answered by then is not answered any more: 24h, or another number of s, m, h, d.",
    )
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    output_expires_after: ExpiresAfter | None = Field(None, description="Of the files that it writes; none: never.")


class File(TypedDict):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: None


class Files(TypedDict):
    """Files, the newest first."""

    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(TypedDict):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchProblem(TypedDict):
    """Why a batch failed."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchProblems(TypedDict):
    """Why a batch failed."""

    object: Literal["list"]
    data: list[BatchProblem]


class RequestCounts(TypedDict):
    """How far a batch is."""

    total: int
    completed: int
    failed: int


class Batch(TypedDict):
    """A batch. output_file_id: of the answers; error_file_id: of the requests that failed, once it has ended."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class Batches(TypedDict):
    """Batches, the newest first."""

    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


_PAGE = {"after": "The id behind which the page begins.", "limit": "Most that are listed."}
_FILE_PAGE = {**_PAGE, "order": "asc or desc (desc), by time.", "purpose": "batch or batch_output; none: both."}
_UNKNOWN = (Errors(statuses=(400, 404)),)


def dialect(store: Store | None, dialects: Sequence[Dialect]) -> Dialect:
    """The routes of a store; without one they say how to turn them on. dialects: whose routes lines may ask."""
    posts = [
        one for one in endpoints(dialects) if one.route.method == "POST" and not one.path.startswith(NOT_FOR_LINES)
    ]
    api = _Api(store, lambda path: any(one.pattern.fullmatch(path) for one in posts), [one.path for one in posts])
    off = store is None
    return Dialect(
        "batches",
        (
            Route(
                "POST", "/v1/files", api.upload_file, None, (File,), form=UploadFields, errors=(Errors(),), hidden=off
            ),
            Route("GET", "/v1/files", api.list_files, None, (Files,), query=_FILE_PAGE, errors=_UNKNOWN, hidden=off),
            Route(
                "GET",
                "/v1/files/{file_id}/content",
                api.file_content,
                media=("application/octet-stream",),
                errors=_UNKNOWN,
                hidden=off,
            ),
            Route("GET", "/v1/files/{file_id}", api.file, None, (File,), errors=_UNKNOWN, hidden=off),
            Route("DELETE", "/v1/files/{file_id}", api.delete_file, None, (DeletedFile,), errors=_UNKNOWN, hidden=off),
            Route("POST", "/v1/batches", api.create_batch, BatchFields, (Batch,), hidden=off),
            Route("GET", "/v1/batches", api.list_batches, None, (Batches,), query=_PAGE, errors=_UNKNOWN, hidden=off),
            Route(
                "POST", "/v1/batches/{batch_id}/cancel", api.cancel_batch, None, (Batch,), errors=_UNKNOWN, hidden=off
            ),
            Route("GET", "/v1/batches/{batch_id}", api.batch, None, (Batch,), errors=_UNKNOWN, hidden=off),
        ),
    )


class _Api:
    """The routes over one store."""

    def __init__(self, store: Store | None, is_route: Callable[[str], bool], paths: Sequence[str]) -> None:
        self._store, self._is_route, self._paths = store, is_route, paths

    @property
    def store(self) -> Store:
        """The store.

        Raises:
            NotFound: there is none.
        """
        if self._store is None:
            raise NotFound(_OFF)
        return self._store

    async def upload_file(self, call: Call) -> Response:
        """Keep a file of requests, JSON lines."""
        store = self.store
        async with store.upload() as (file_id, part):
            form = await _received(call, part)
            fields = UploadFields.model_validate({**form.fields, "file": form.filename})
            keep = partial(store.keep, file_id, part, form.filename, fields.purpose, fields.expires_after_seconds)
            return as_json(await asyncio.to_thread(keep))

    async def list_files(self, call: Call) -> Response:
        """The files, the newest first."""
        files, query = await self.store.files(), call.http.query_params
        if query.get("purpose"):
            files = [one for one in files if one["purpose"] == query["purpose"]]
        if _one_of(query, "order", ("desc", "asc")) == "asc":
            files.reverse()
        return as_json(_page(files, query, 10_000, 10_000))

    async def file(self, call: Call) -> Response:
        """What is known of a file."""
        return as_json(await self.store.file(call.path_params["file_id"]))

    async def file_content(self, call: Call) -> Response:
        """The content of a file."""
        file = await self.store.file(call.path_params["file_id"])
        path = self.store.content(file["id"])
        return FileResponse(path, media_type="application/octet-stream", filename=file["filename"])

    async def delete_file(self, call: Call) -> Response:
        """Remove a file; one that a batch still reads is refused."""
        file_id = call.path_params["file_id"]
        await self.store.delete(file_id)
        return as_json({"id": file_id, "object": "file", "deleted": True})

    async def create_batch(self, call: Call, fields: BatchFields) -> Response:
        """Begin to answer the requests of a file, behind all live ones."""
        store = self.store
        if not self._is_route(fields.endpoint):
            near = did_you_mean(fields.endpoint, self._paths)
            raise InvalidRequest(
                f"endpoint must be the path of a route that takes POST, got {fields.endpoint[:100]!r}.{near}",
                "endpoint",
                fields.endpoint,
            )
        window = fields.completion_window
        seconds = int(window[:-1]) * _SECONDS[window[-1]]
        keep = None if fields.output_expires_after is None else fields.output_expires_after.seconds
        return as_json(
            await store.create(fields.input_file_id, fields.endpoint, (window, seconds), fields.metadata, keep)
        )

    async def list_batches(self, call: Call) -> Response:
        """The batches, the newest first."""
        return as_json(_page(await self.store.batches(), call.http.query_params, 100, 20))

    async def batch(self, call: Call) -> Response:
        """How far a batch is."""
        return as_json(await self.store.batch(call.path_params["batch_id"]))

    async def cancel_batch(self, call: Call) -> Response:
        """End a batch; what is answered becomes its output."""
        return as_json(await self.store.cancel(call.path_params["batch_id"]))


def _page(items: Sequence[Mapping[str, Any]], query: Mapping[str, str], most: int, usual: int) -> dict[str, object]:
    """A page of a list, as its query asks. most, usual: how many it may hold, and holds.

    Raises:
        InvalidRequest: a limit that is none. NotFound: it begins behind what is not there.
    """
    limit, after = query.get("limit", str(usual)), query.get("after")
    if not re.fullmatch(r"[0-9]{1,6}", limit) or not 1 <= int(limit) <= most:
        raise InvalidRequest(f"limit must be a number from 1 to {most}, got {limit[:20]!r}.", "limit", limit)
    begin = 0
    if after:
        places = [place for place, one in enumerate(items) if one["id"] == after]
        if not places:
            raise NotFound(f"There is nothing {after[:60]!r} behind which a page could begin.")
        begin = places[0] + 1
    data = items[begin : begin + int(limit)]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": begin + len(data) < len(items),
    }


def _one_of(query: Mapping[str, str], name: str, values: Sequence[str]) -> str:
    value = query.get(name, values[0])
    if value not in values:
        raise InvalidRequest(f"{name} must be {' or '.join(values)}, got {value[:20]!r}.", name, value)
    return value


class _Form:
    """A form whose one file goes to the disk as it comes. filename: the last part of the name that the client gave."""

    def __init__(self, boundary: bytes, sink: IO[bytes], most: int) -> None:
        import python_multipart

        self.fields: dict[str, str] = {}
        self.filename = ""
        self.ended = False
        self._sink, self._most, self._size = sink, most, 0
        self._header = [bytearray(), bytearray()]
        self._name = ""
        self._value: bytearray | None = None
        self._parser = python_multipart.MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_of_header,
                "on_part_data": self._data,
                "on_part_end": self._end_of_part,
                "on_end": self._end,
            },
        )

    def write(self, data: bytes) -> None:
        """The next bytes of the body.

        Raises:
            Refused: it is no form, or too large.
        """
        from python_multipart.exceptions import FormParserError

        try:
            self._parser.write(data)
        except FormParserError as error:
            raise Refused(f"The body is no multipart form: {error}", parameter="body") from None

    def _begin(self) -> None:
        self._name, self._value = "", bytearray()

    def _end_of_header(self) -> None:
        from python_multipart.multipart import parse_options_header

        (name, value), self._header = self._header, [bytearray(), bytearray()]
        if bytes(name).lower() != b"content-disposition":
            return
        _, options = parse_options_header(bytes(value))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == "file":
            if self.filename:
                raise Refused("The form has two files; send one at a time.", parameter="file")
            self.filename = _file_name(options.get(b"filename", b"").decode("utf-8", "replace"))
            self._value = None

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._value is not None:
            self._value += data[start:end]
            if len(self._value) > _FIELD_BYTES:
                raise Refused(f"The field {self._name[:50]!r} is longer than {_FIELD_BYTES} bytes.", 413)
            return
        self._size += end - start
        if self._size > self._most:
            raise Refused(f"The file is larger than {self._most} bytes (--max-file-bytes).", 413, "file")
        self._sink.write(data[start:end])

    def _end_of_part(self) -> None:
        if self._value is not None:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.ended = True


async def _received(call: Call, part: Path) -> _Form:
    """The form of a request, whose file is written.

    Raises:
        Refused: another content type, no file, no form, too large, or too slow. Disconnected: the client hung up within it.
    """
    http, settings = call.http, call.settings
    kind, _, rest = http.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "multipart/form-data":
        raise WrongContentType(f"The content type must be multipart/form-data, got {kind[:50] or 'none'}.")
    boundary = re.search(r'boundary="?([^";,]{1,200})"?', rest)
    if boundary is None:
        raise Refused("The content type names no boundary.", parameter="body")
    with part.open("wb") as sink:
        form = _Form(boundary[1].strip().encode(), sink, settings.max_file_bytes)
        more = True
        while more:
            try:
                # Of a large file, each piece has this time.
                async with asyncio.timeout(settings.body_timeout_seconds):
                    message = await http.receive()
            except TimeoutError:
                raise Refused(f"No more of the body came for {settings.body_timeout_seconds:g} seconds.", 408) from None
            if message["type"] == "http.disconnect":
                raise Disconnected
            form.write(message.get("body", b""))
            more = message.get("more_body", False)
    if not form.ended:
        raise Refused("The form ends too early.", parameter="body")
    if not form.filename:
        raise Refused("The form has no field 'file' with a file.", parameter="file")
    return form


def _file_name(name: str) -> str:
    """The last part of a path, as people see it; nothing on the disk is called so.

    Raises:
        Refused: there is none, or one that cannot be shown.
    """
    last = PurePosixPath(name.replace("\\", "/")).name
    if last in ("", "..") or not last.isprintable() or len(last.encode()) > _NAME_BYTES:
        raise Refused(
            f"The name of the file must be 1 to {_NAME_BYTES} printable bytes, got {name[:50]!r}.", parameter="file"
        )
    return last
