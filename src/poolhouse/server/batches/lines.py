"""Lines: a line of a batch file becomes a request of the application, and the reply a line of the output."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import orjson

from poolhouse.errors import EngineError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

# Beside its body a line has an id, a path and a few names.
_ENVELOPE_BYTES = 64 * 1024
# What a long line is passed over by.
_BLOCK = 1 << 20
# Lines, and bytes, that are read at a time.
_LINES_AT_ONCE, _BYTES_AT_ONCE = 64, 1 << 20
# Routes whose replies are no answers to a line.
NOT_FOR_LINES = ("/v1/files", "/v1/batches", "/ping")


class Line(NamedTuple):
    """A line of a file. number: from 1. end: the bytes of the file up to its end. raw: None of one that is too long."""

    number: int
    raw: bytes | None
    end: int


class Reply(NamedTuple):
    """A line of the output, with its end. answered: whether the request succeeded."""

    line: bytes
    answered: bool


class Reader:
    """The lines of a stream that are not blank; `read` bytes with `number` lines of it are passed over.

    longest: bytes of a body. A longer line is not read into memory.
    """

    def __init__(self, stream: IO[bytes], read: int, number: int, longest: int) -> None:
        self._stream, self._longest = stream, longest + _ENVELOPE_BYTES
        self._read, self._number = read, number
        if stream.seekable():
            stream.seek(read)
        else:
            # A stream is given anew, and what was read of it is passed over.
            while read > 0 and (block := stream.read(min(read, _BLOCK))):
                read -= len(block)

    def some(self) -> list[Line]:
        """The next ones; none at the end."""
        found: list[Line] = []
        size = 0
        while len(found) < _LINES_AT_ONCE and size < _BYTES_AT_ONCE and (raw := self._stream.readline(self._longest)):
            self._read += len(raw)
            self._number += 1
            whole = raw.endswith(b"\n") or len(raw) < self._longest
            while not whole and (rest := self._stream.readline(_BLOCK)):
                self._read += len(rest)
                whole = rest.endswith(b"\n")
                raw = b"-"
            if self._number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                too_long = len(raw) == 1 and raw == b"-"
                found.append(Line(self._number, None if too_long else raw, self._read))
                size += len(raw)
        return found


class Wrong(Exception):
    """A line that is no request. code: what is wrong, in a word, as OpenAI has it."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


class Requester:
    """Answers lines by the routes of an application, without a socket.

    alive: whether its engines can answer. endpoint: the one path that lines may ask; None: any.
    """

    def __init__(self, app: ASGIApp, alive: Callable[[], bool], endpoint: str | None = None) -> None:
        self.app, self.alive, self.endpoint = app, alive, endpoint

    async def reply(self, line: Line) -> Reply:
        """The answer to a line, or what is wrong with it.

        Raises:
            EngineError: the engines cannot answer any more; the line has no answer.
        """
        try:
            custom_id, url, body = _parsed(line, self.endpoint)
            status, headers, content = await self._ask(url, body)
            if status >= 500 and not self.alive():
                raise EngineError("The engine was lost or closed before the batch was answered.")
            answer = _in_json(headers.get(b"content-type", b""), content, custom_id)
        except Wrong as wrong:
            return refusal(wrong.code, f"Line {line.number}: {wrong}", wrong.custom_id)
        head = orjson.dumps({"id": _new_id(), "custom_id": custom_id})[:-1]
        request_id = orjson.dumps(headers.get(b"x-request-id", b"").decode("latin-1"))
        response = b'{"status_code":%d,"request_id":%b,"body":%b}' % (status, request_id, answer)
        return Reply(b'%b,"response":%b,"error":null}\n' % (head, response), 200 <= status < 300)

    async def _ask(self, url: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers and body of the reply."""
        path, _, query = url.partition("?")
        messages: list[Message] = []
        unread: Iterator[Message] = iter(({"type": "http.request", "body": body, "more_body": False},))

        async def receive() -> Message:
            # Nobody hangs up.
            return next(unread, None) or await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            messages.append(message)

        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": None,
            "server": None,
            "state": {"behind": True},
        }
        await self.app(scope, receive, send)
        start, *bodies = messages
        return start["status"], dict(start["headers"]), b"".join(one.get("body", b"") for one in bodies)


def refusal(code: str, message: str, custom_id: str | None) -> Reply:
    """The line of a request that was never made."""
    error = {"code": code, "message": message}
    line = {"id": _new_id(), "custom_id": custom_id, "response": None, "error": error}
    return Reply(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE), False)


def custom_id_of(line: Line) -> str | None:
    """The id that a line gives itself, where it does."""
    try:
        value = orjson.loads(line.raw or b"")
    except orjson.JSONDecodeError:
        return None
    found = value.get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a line: its type, and how messages call that."""

    kind: type
    called: str


_FIELDS = {
    "custom_id": _Field(str, "a text"),
    "method": _Field(str, '"POST"'),
    "url": _Field(str, "the path of a route, such as /v1/embeddings"),
    "body": _Field(dict, "an object"),
}


def _parsed(line: Line, endpoint: str | None) -> tuple[str, str, bytes]:
    """Id, URL and body.

    Raises:
        Wrong: it is no request, or one that no line may make.
    """
    if line.raw is None:
        raise Wrong("line_too_long", "it is longer than the largest request body.")
    try:
        value = orjson.loads(line.raw)
    except orjson.JSONDecodeError as error:
        raise Wrong("invalid_json_line", f"it is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Wrong("invalid_json_line", "it is no JSON object.")
    custom_id = value.get("custom_id")
    known = custom_id if isinstance(custom_id, str) else None
    for name, field in _FIELDS.items():
        if value.get(name) is None:
            raise Wrong("missing_required_parameter", f"it has no '{name}', which is {field.called}.", known)
        if not isinstance(value[name], field.kind):
            raise Wrong("invalid_type", f"'{name}' must be {field.called}.", known)
    url: str = value["url"]
    if value["method"] != "POST":
        raise Wrong("invalid_method", f"'method' must be \"POST\", got {value['method'][:20]!r}.", known)
    if not url.startswith("/") or url.partition("?")[0].startswith(NOT_FOR_LINES):
        raise Wrong("invalid_url", f"'url' must be the path of a route that answers POST, got {url[:100]!r}.", known)
    if endpoint is not None and url != endpoint:
        raise Wrong("mismatched_url", f"'url' is {url[:100]!r}, and the batch is for {endpoint!r}.", known)
    return value["custom_id"], url, orjson.dumps(value["body"])


def _in_json(content_type: bytes, content: bytes, custom_id: str) -> bytes:
    """A reply's body as a value within a line.

    Raises:
        Wrong: a body of bytes.
    """
    if not content:
        return b"null"
    if content_type.partition(b";")[0].strip() != b"application/json":
        raise Wrong("not_json", "the reply is no JSON; ask for numbers or base64 instead of bytes.", custom_id)
    # Ours has no line breaks.
    return content if b"\n" not in content else orjson.dumps(orjson.loads(content))


def _new_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"
