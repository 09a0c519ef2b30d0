"""Page: what browsers get at /, a page that tries each task; its files lie here, and need nothing from elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from poolhouse.server.security import path_of

# Where the files are, beside the page at /.
PREFIX = "/page/"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# The page holds a key and the texts of its user: nothing of it may come from elsewhere, or go there.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class File:
    """One file of the page. path: where it is served, which the log and the metrics show."""

    path: str
    content: bytes
    media_type: str
    tag: str


class Page:
    """Answers GET of browsers at / and of the page's files; everything else, probes at / as well, goes to `app`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = response_to(scope)
        await (self.app if response is None else response)(scope, receive, send)


def response_to(scope: Scope) -> Response | None:
    """The page, or a file of it, where a request asks for one; HEAD gets what GET gets."""
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return None
    path, headers = path_of(scope), Headers(scope=scope)
    if path == "/" and not _wants_html(headers.get("accept", "")):
        return None
    file = FILES.get(path)
    if file is None:
        return None
    scope["route"] = file
    if path == "/" and not scope["path"].endswith("/"):
        # Its files are named relative to it, and a prefix without a slash would lose its last part.
        return RedirectResponse(f"{scope['path']}/")
    same = file.tag in (tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(","))
    shown = {**_HEADERS, "etag": file.tag, **({"vary": "Accept"} if path == "/" else {})}
    if same:
        return Response(status_code=304, headers=shown)
    return Response(file.content, headers=shown, media_type=file.media_type)


def _wants_html(accept: str) -> bool:
    """Whether a header Accept names HTML, as those of browsers do and those of probes do not."""
    ranges = (part.replace(" ", "").lower().split(";") for part in accept.split(","))
    return any(kind == "text/html" and not {"q=0", "q=0.0"} & set(options) for kind, *options in ranges)


def _read() -> dict[str, File]:
    """The files by their paths."""
    folder, files = Path(__file__).parent, {}
    for source in sorted(folder.rglob("*")):
        if source.suffix in _TYPES:
            path = PREFIX + source.relative_to(folder).as_posix()
            files[path] = _file(path, source, _TYPES[source.suffix])
    files["/"] = _file("/", folder / "index.html", "text/html; charset=utf-8")
    return files


def _file(path: str, source: Path, media_type: str) -> File:
    content = source.read_bytes()
    return File(path, content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


FILES = _read()
