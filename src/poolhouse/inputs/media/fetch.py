"""Fetching: the bytes of pictures that URLs, data URIs and files name, by a policy that strangers' URLs cannot get around.

URL ─► parsed once ─► host resolved once ─► every address public, or the host named by the user ─► connected to that
       address, while TLS and Host keep the name ─► bytes counted as they come; a redirect goes through all of it again
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import stat
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from poolhouse.errors import ConfigError, FetchFailed, InvalidRequest
from poolhouse.inputs.media.images import bytes_of_base64, too_many_bytes
from poolhouse.version import __version__

if TYPE_CHECKING:
    import httpx

# The addresses of a host and port, each looked up once per hop.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
# Not public, though Python says so: metadata servers of Azure and Oracle, and IPv6 addresses that hold an IPv4 one, which may
# be any: NAT64 twice, 6to4, Teredo, mapped, translated, compatible.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            *("168.63.129.16/32", "192.0.0.0/24", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"),
            *("::ffff:0:0/96", "::ffff:0:0:0/96", "::/96"),
        ),
    )
)
# Fetches, and look-ups of names, at a time.
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What may be fetched, how large it may be and how long it may take.

    allowed_domains: exact host names or addresses; where there are any, only these are asked, wherever they are, over http
    too and on any port. None: all hosts whose addresses are public, on the ports of http and https.
    local_folder: texts may name files below it; None: no files.
    connect_seconds: of one connection. total_seconds: from the first look-up to the last byte, redirects included.

    Raises:
        ConfigError: a domain that is a URL, or a folder that does not exist.
    """

    allowed_domains: tuple[str, ...] = ()
    local_folder: Path | None = None
    max_bytes: int = 20 * 1024 * 1024
    connect_seconds: float = 5.0
    total_seconds: float = 20.0
    max_redirects: int = 3

    def __post_init__(self) -> None:
        for domain in self.allowed_domains:
            if not re.fullmatch(r"[^\s/@\\*?#:]+|\[?[0-9a-fA-F:.]+\]?", domain):
                raise ConfigError(
                    f"allowed_media_domains: {domain!r} is no host name or address; write it without scheme, port or path."
                )
        if self.local_folder is not None and not self.local_folder.is_dir():
            raise ConfigError(f"allowed_local_media_path: there is no folder {self.local_folder}.")
        object.__setattr__(self, "allowed_domains", tuple(map(_one_form, self.allowed_domains)))


def is_remote(source: object) -> bool:
    """Whether a picture is to be fetched over http or https."""
    return isinstance(source, str) and re.match("https?:", source, re.IGNORECASE) is not None


def read_local(source: str | Path, path: str, policy: FetchPolicy, any_file: bool) -> bytes:
    """The bytes of a data URI or of a file.

    source: "data:...;base64,...", "file:///..." or a path. path: the item, for errors.
    any_file: a text may name files outside `policy.local_folder` too. A `Path` always may.

    Raises:
        InvalidRequest: another scheme, base64 that is none, or a file that is not to be read or too large.
    """
    if isinstance(source, Path):
        return _read_file(source, path, policy.max_bytes)
    scheme = found[1].lower() if (found := re.match(r"([a-z][a-z0-9+.-]+):", source, re.IGNORECASE)) else ""
    if scheme == "data":
        header, comma, data = source.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise InvalidRequest(f"{path}: a data URI of a picture is written data:image/...;base64,...", path)
        return bytes_of_base64(data, path, policy.max_bytes)
    if scheme and (scheme != "file" and not (any_file and not source.startswith("//", len(scheme) + 1))):
        raise InvalidRequest(f"{path}: The URL must be either a HTTP, data or file URL.", path)
    if not any_file and policy.local_folder is None:
        raise InvalidRequest(
            f"{path}: files are not read; a picture is an http, https or data URL (allowed_local_media_path opens a folder).",
            path,
        )
    file = Path(_path_of_uri(source, path) if scheme == "file" else source)
    return _read_file(file, path, policy.max_bytes, None if any_file else policy.local_folder)


def _path_of_uri(uri: str, path: str) -> str:
    rest = uri[len("file:") :]
    if rest.startswith("//"):
        host, slash, rest = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise InvalidRequest(f"{path}: a file URL names a file of this machine: file:///folder/file.", path)
        rest = slash + rest
    return unquote(rest)


def _read_file(file: Path, path: str, max_bytes: int, folder: Path | None = None) -> bytes:
    """The bytes of a regular file, below `folder` if there is one; links are followed before that is looked at."""
    try:
        file = file.expanduser() if folder is None else file.resolve()
        if folder is not None and not file.is_relative_to(folder.resolve()):
            raise InvalidRequest(
                f"{path}: the file lies outside of the folder that allowed_local_media_path opens.", path
            )
        # Asked first: opening a pipe would wait.
        if not stat.S_ISREG(file.stat().st_mode):
            raise InvalidRequest(f"{path}: this is no regular file.", path)
        with file.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InvalidRequest):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or "no such path"
        raise InvalidRequest(f"{path}: the file cannot be read: {reason}.", path) from None
    if len(data) > max_bytes:
        raise too_many_bytes(path, max_bytes)
    return data


class Fetcher:
    """Fetches many URLs at once, in one thread with an event loop, which the first one starts.

    resolve: looks names up.
    """

    def __init__(self, policy: FetchPolicy, resolve: Resolve | None = None) -> None:
        self._policy = policy
        self._resolve = resolve or _resolved
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: set[Future[bytes]] = set()
        self._closed = False

    def fetch(self, url: str, path: str) -> Future[bytes]:
        """The bytes behind a URL; cancel the future to stop. path: the item, for errors.

        Its errors:
            InvalidRequest: a URL that is not to be asked. FetchFailed: it does not give a file of allowed size in time.
        """
        return self._run(self._fetched(url, path))

    def close(self) -> None:
        """Stop; what runs is cancelled."""
        with self._lock:
            self._closed, loop, self._loop = True, self._loop, None
        # These alone: a task within them may not have begun, and is cancelled by what waits for it.
        for fetch in list(self._running):
            fetch.cancel()
        if loop is not None:
            asyncio.run_coroutine_threadsafe(_stopped(loop), loop)

    def _run(self, work: Coroutine[Any, Any, bytes]) -> Future[bytes]:
        with self._lock:
            if self._closed:
                work.close()
                cancelled: Future[bytes] = Future()
                cancelled.cancel()
                return cancelled
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_default_executor(ThreadPoolExecutor(_AT_ONCE, "poolhouse-names"))
                threading.Thread(
                    target=_run_until_stopped, args=[self._loop], name="poolhouse-fetch", daemon=True
                ).start()
            fetch = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._running.add(fetch)
        fetch.add_done_callback(self._running.discard)
        return fetch

    @cached_property
    def _turns(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(_AT_ONCE)

    @cached_property
    def _transport(self) -> httpx.AsyncHTTPTransport:
        """Bare HTTP/1.1: without proxies, cookies, redirects, decompression, or a log of URLs. Its connections are never used twice,
        since one belongs to a name and not to an address."""
        import httpx

        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.AsyncHTTPTransport(verify=httpx.create_ssl_context(), trust_env=False, limits=limits)

    async def _fetched(self, text: str, path: str) -> bytes:
        try:
            url = _parsed(text)
            async with self._turns, asyncio.timeout(self._policy.total_seconds):
                for _ in range(self._policy.max_redirects + 1):
                    answer = await self._hop(url)
                    if isinstance(answer, bytes):
                        return answer
                    if (url.scheme, answer.scheme) == ("https", "http"):
                        raise _Failed(url, "a redirect leads from https to http")
                    url = answer
                raise _Failed(url, f"more than {self._policy.max_redirects} redirects (media_redirects)")
        except TimeoutError:
            reason = f"no whole answer within {self._policy.total_seconds:g} seconds (media_seconds)"
            raise _Failed(url, reason).at(path) from None
        except _Failed as error:
            raise error.at(path) from None

    async def _hop(self, url: httpx.URL) -> bytes | httpx.URL:
        """What one URL gives: bytes, or where it redirects to."""
        import httpx

        addresses = await self._addresses(url)
        seconds, total = self._policy.connect_seconds, self._policy.total_seconds
        for address in addresses:
            request = httpx.Request(
                "GET",
                url.copy_with(host=address),
                headers={
                    "Host": url.netloc.decode("ascii"),
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "User-Agent": f"poolhouse/{__version__}",
                    "Connection": "close",
                },
                extensions={
                    "sni_hostname": url.raw_host.decode("ascii"),
                    "timeout": {"connect": seconds, "read": total, "write": total, "pool": None},
                },
            )
            try:
                response = await self._transport.handle_async_request(request)
            except httpx.ConnectTimeout:
                failure = _Failed(url, f"no connection within {seconds:g} seconds (media_connect_seconds)")
            except httpx.ConnectError as error:
                failure = _Failed(url, f"no connection ({error})")
            except httpx.TransportError as error:
                raise _Failed(url, f"the connection broke off ({type(error).__name__})") from None
            else:
                try:
                    return await self._answer(url, response)
                except httpx.TransportError as error:
                    raise _Failed(url, f"the connection broke off ({type(error).__name__})") from None
                finally:
                    await response.aclose()
        raise failure

    async def _addresses(self, url: httpx.URL) -> Sequence[str]:
        """The addresses of the host, all of which may be asked."""
        named = _host_name(url) in self._policy.allowed_domains
        if self._policy.allowed_domains and not named:
            raise _Refused(url, "its host is not one of allowed_media_domains")
        if not named and url.port is not None:
            raise _Refused(url, "only hosts of allowed_media_domains are asked on other ports than 80 and 443")
        try:
            addresses = await self._resolve(url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme])
        except (OSError, UnicodeError):
            raise _Failed(url, "its host is not found") from None
        if not addresses:
            raise _Failed(url, "its host is not found")
        if not named and not all(map(_is_public, addresses)):
            raise _Refused(url, "its host has an address that is not public (allowed_media_domains may name the host)")
        return addresses

    async def _answer(self, url: httpx.URL, response: httpx.Response) -> bytes | httpx.URL:
        import httpx

        if response.status_code in _REDIRECTS and "location" in response.headers:
            return _parsed(response.headers["location"], url)
        if response.status_code != 200:
            raise _Failed(url, f"HTTP {response.status_code} error")
        if (coding := response.headers.get("content-encoding", "identity")) != "identity":
            raise _Failed(url, f"the answer is compressed ({coding[:20]}), which was not asked for")
        max_bytes, data = self._policy.max_bytes, bytearray()
        assert isinstance(response.stream, httpx.AsyncByteStream)
        async for part in response.stream:
            data += part
            if len(data) > max_bytes:
                raise _Failed(url, f"more than {max_bytes} bytes (max_image_bytes)")
        return bytes(data)


class _Failed(Exception):
    """A fetch that fails; its text names the host, never what may be secret of a URL."""

    def __init__(self, url: httpx.URL | None, reason: str) -> None:
        where = "" if url is None else f" from {url.scheme}://{url.raw_host.decode('ascii')}"
        super().__init__(f"Failed to fetch the picture{where}: {reason}.")

    def at(self, path: str) -> InvalidRequest:
        return FetchFailed(f"{path}: {self}", path)


class _Refused(_Failed):
    """A URL that is not asked at all."""

    def at(self, path: str) -> InvalidRequest:
        return InvalidRequest(f"{path}: {self}", path)


def _parsed(text: str, base: httpx.URL | None = None) -> httpx.URL:
    """A URL of http or https, read once: what is checked and what is asked are parts of it. base: what a redirect starts from."""
    try:
        import httpx
    except ImportError:
        raise _Refused(None, "the server lacks httpx (pip install 'poolhouse[images]')") from None

    if "\\" in text or any(sign.isspace() or not sign.isprintable() for sign in text):
        raise _Refused(base, "the URL holds blanks, backslashes or control characters")
    try:
        url = httpx.URL(text) if base is None else base.join(text)
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise _Refused(base, "the URL cannot be read") from None
    if url.scheme not in _PORTS or not url.raw_host or not 0 < (url.port or 1) < 2**16:
        raise _Refused(base, "the URL is no http or https URL with a host and a port that exist")
    if url.userinfo or re.match(r"[^/?#]*//[^/?#]*@", text):
        raise _Refused(None, "the URL holds a user name or a password")
    return url


def _host_name(url: httpx.URL) -> str:
    """The host of a URL in the one form in which hosts are compared."""
    host = url.raw_host.decode("ascii").rstrip(".")
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    return host


def _one_form(domain: str) -> str:
    """The same for a host that the user names."""
    import httpx

    try:
        return _host_name(httpx.URL(scheme="http", host=domain.strip("[]")))
    except (httpx.InvalidURL, UnicodeError):
        raise ConfigError(f"allowed_media_domains: {domain!r} is no host name.") from None


def _is_public(text: str) -> bool:
    """Whether an address belongs to the public internet, whatever way it is written."""
    address = ipaddress.ip_address(text.partition("%")[0])
    listed = any(address in network for network in _NOT_PUBLIC)
    return address.is_global and not (listed or address.is_multicast or address.is_reserved)


async def _resolved(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _stopped(loop: asyncio.AbstractEventLoop) -> None:
    """Stop the running loop once all other tasks, which are cancelled, have ended and their sockets are closed."""
    while others := asyncio.all_tasks(loop) - {asyncio.current_task()}:
        await asyncio.gather(*others, return_exceptions=True)
    # A transport closes its socket in the next round.
    await asyncio.sleep(0.01)
    loop.stop()
