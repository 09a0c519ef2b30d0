"""Security: API keys, cross-origin browsers (CORS), TLS, and limits on URLs and headers."""

from __future__ import annotations

import codecs
import hashlib
import hmac
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from poolhouse.errors import ConfigError
from poolhouse.settings import ServerSettings, visible_key

# Probes of supervisors and load balancers hold no key.
OPEN_PATHS = frozenset(
    {"/health", "/health/live", "/health/ready", "/v1/health/live", "/v1/health/ready", "/ping", "/infinity/health"}
    | {"/tei/health", "/tei/ping"}
    | {f"{prefix}/.well-known/{state}" for prefix in ("", "/weaviate") for state in ("live", "ready")}
)
# Here GET alone asks for the health; POST is for the model.
_OPEN_ROOTS = frozenset({"/", "/tei", "/tei/"})
# Where a refusal has another form than vLLM's; Voyage's client cannot read any but its own.
_REFUSALS = {
    "/voyage/": b'{"detail":"Unauthorized"}',
    "/v1/multimodalembeddings": b'{"detail":"Unauthorized"}',
    "/infinity/": b'{"detail":"Unauthorized"}',
    "/jina/": b'{"detail":"Unauthorized"}',
    "/cohere/": b'{"message":"Unauthorized"}',
}
_KEY_HEADERS = (b"authorization", b"x-api-key", b"api-key")


def guarded(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """The app behind the checks of the settings: limits first, then CORS, then keys."""
    keys = api_keys(settings)
    if keys:
        app = ApiKeys(app, keys)
    if settings.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=("x-request-id", "x-poolhouse-truncated", "retry-after"),
        )
    return HeaderLimits(app, settings.max_header_bytes, settings.max_url_bytes)


def api_keys(settings: ServerSettings) -> tuple[str, ...]:
    """The keys of the options and of their file, which holds one per line; empty lines and # comments count for nothing.

    Raises:
        ConfigError: the file cannot be read, or holds no key.
    """
    keys = [key.get_secret_value() for key in settings.api_key]
    if settings.api_key_file is not None:
        found = _keys_of(settings.api_key_file)
        if not found:
            raise ConfigError(f"api_key_file: {settings.api_key_file} holds no key; the server would be open to all.")
        keys += found
    return tuple(dict.fromkeys(keys))


def _keys_of(path: str) -> list[str]:
    try:
        content = Path(path).read_bytes()
        # PowerShell's > writes UTF-16. A byte order mark goes with the blanks around a key.
        utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        lines = content.decode("utf-16" if utf_16 else "utf-8").replace("\r", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file: {error}") from None
    keys = []
    for number, line in enumerate(lines, start=1):
        key = line.strip().strip("\ufeff").strip()
        if key and not key.startswith("#"):
            try:
                keys.append(visible_key(key))
            except ValueError as error:
                raise ConfigError(f"api_key_file: line {number} of {path}: {error}") from None
    return keys


class ApiKeys:
    """Answers 401 to requests without one of the keys, before their body is read.

    A key stands behind `Authorization: Bearer`, or in `x-api-key` or `api-key`.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        # Digests have one length, so the time of a comparison does not depend on a key's.
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or is_probe(scope) or self._shown(scope):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        path = path_of(scope)
        refusals = (body for prefix, body in _REFUSALS.items() if path.startswith(prefix))
        await _answer(send, 401, next(refusals, b'{"error":"Unauthorized"}'), headers)

    def _shown(self, scope: Scope) -> bool:
        found = False
        for name, value in scope["headers"]:
            if name not in _KEY_HEADERS:
                continue
            if name == b"authorization":
                scheme, _, shown = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    continue
            else:
                shown = value
            digest = hashlib.sha256(shown.strip()).digest()
            # All of them, always: the time must not depend on which one fits.
            for key in self.digests:
                found |= hmac.compare_digest(digest, key)
        return found


class HeaderLimits:
    """Answers 414 to longer URLs and 431 to more bytes of headers."""

    def __init__(self, app: ASGIApp, header_bytes: int, url_bytes: int) -> None:
        self.app = app
        self.header_bytes = header_bytes
        self.url_bytes = url_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            url = len(scope.get("raw_path") or b"") + len(scope["query_string"])
            if url > self.url_bytes:
                await _answer(send, 414, b'{"error":"The URL is longer than %d bytes."}' % self.url_bytes)
                return
            if url + sum(len(name) + len(value) for name, value in scope["headers"]) > self.header_bytes:
                await _answer(send, 431, b'{"error":"The headers are larger than %d bytes."}' % self.header_bytes)
                return
        await self.app(scope, receive, send)


class TlsOptions(TypedDict, total=False):
    """TLS as `uvicorn.Config` takes it."""

    ssl_certfile: str
    ssl_keyfile: str | None
    ssl_keyfile_password: str | None
    ssl_cert_reqs: int
    ssl_ca_certs: str | None
    ssl_ciphers: str


def tls_options(settings: ServerSettings) -> TlsOptions:
    """What uvicorn needs for TLS; nothing where no certificate is set.

    Raises:
        ConfigError: half of what TLS needs, or files that do not fit.
    """
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None or settings.ssl_cert_reqs or settings.ssl_ca_certs is not None:
            raise ConfigError("TLS needs a certificate: --ssl-certfile FILE, with --ssl-keyfile FILE.")
        return {}
    if settings.ssl_cert_reqs and settings.ssl_ca_certs is None:
        raise ConfigError("--ssl-cert-reqs asks for client certificates; --ssl-ca-certs must say who signs them.")
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        file = getattr(settings, name)
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"{name}: there is no file {file}.")
    password = settings.ssl_keyfile_password
    options: TlsOptions = {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_keyfile_password": None if password is None else password.get_secret_value(),
        "ssl_cert_reqs": settings.ssl_cert_reqs,
        "ssl_ca_certs": settings.ssl_ca_certs,
    }
    if settings.ssl_ciphers is not None:
        # Else uvicorn takes its own default.
        options["ssl_ciphers"] = settings.ssl_ciphers
    return options


class CertificateFiles:
    """Reloads the certificate into a TLS context when its files change."""

    def __init__(self, context: ssl.SSLContext, settings: ServerSettings) -> None:
        assert settings.ssl_certfile is not None
        self.context = context
        self.certificate, self.key = settings.ssl_certfile, settings.ssl_keyfile
        password = settings.ssl_keyfile_password
        self.password = None if password is None else password.get_secret_value()
        self.seen = self._times()

    def refresh(self) -> bool:
        """Whether the files changed; new connections get the new certificate.

        Raises:
            OSError: the new files do not fit; the old ones stay in use.
        """
        times = self._times()
        if times == self.seen:
            return False
        self.seen = times
        self.context.load_cert_chain(self.certificate, self.key, self.password or "")
        return True

    def _times(self) -> list[int]:
        return [Path(file).stat().st_mtime_ns for file in (self.certificate, self.key) if file is not None]


def is_probe(scope: Scope) -> bool:
    """Whether a request only asks for the server's health."""
    path = path_of(scope)
    return path in OPEN_PATHS or (path in _OPEN_ROOTS and scope["method"] == "GET")


def path_of(scope: Scope) -> str:
    """The path as routes see it, without the prefix of a proxy."""
    return without(scope.get("root_path", ""), scope["path"])


def without(root: str, path: str) -> str:
    """A path without a prefix, if it has that."""
    return (path.removeprefix(root) or "/") if is_below(root, path) else path


def is_below(root: str, path: str) -> bool:
    """Whether a path begins with this prefix, whole; an empty one is none."""
    return root != "" and (path == root or path.startswith(f"{root}/"))


async def _answer(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    headers = headers or [(b"content-type", b"application/json")]
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
