"""Listening: sockets on every address that a host has, or on a unix socket that is ours alone."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from poolhouse.errors import ConfigError
from poolhouse.settings import ServerSettings

_BACKLOG = 2048
# A live server takes connections at once, unless its queue is full.
_SECONDS_TO_CONNECT = 1.0


class Listeners:
    """The listening sockets. `to_all`: whether every address of the machine reaches them.

    Raises:
        ConfigError: an unknown host, or a path where no socket can be.
        OSError: the address is taken or not ours.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.path = None if settings.uds is None else Path(settings.uds)
        self.sockets: list[socket.socket]
        self.inode = None
        if self.path is None:
            self.sockets = _on_every_address(settings.host, settings.port)
        else:
            self.sockets = [_on_path(self.path, int(settings.uds_mode, 8))]
            self.inode = _inode(self.path)
        hosts = [] if self.path is not None else [listener.getsockname()[0] for listener in self.sockets]
        self.to_all = any(ipaddress.ip_address(host.partition("%")[0]).is_unspecified for host in hosts)

    def address(self, scheme: str) -> str:
        """Where clients find the first of them."""
        if self.path is not None:
            return f"unix:{self.path}"
        host, port = self.sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def leave(self) -> None:
        """Take the path of the unix socket away, unless another server has put its own there.

        Before the socket is closed: until then nobody else has its inode.
        """
        if self.path is not None and self.inode is not None and _inode(self.path) == self.inode:
            self.path.unlink(missing_ok=True)
        self.inode = None


def _on_every_address(host: str, port: int) -> list[socket.socket]:
    """A listener for each address of a name; `::` takes IPv4 too, and nothing at all means everywhere."""
    host = host.strip().removeprefix("[").removesuffix("]")
    if host in ("", "*"):
        host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - as requested
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host: there is no address {host}: {error}") from None
    listeners: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        # One port for all, also where the system chooses it.
        port = listeners[0].getsockname()[1] if listeners else port
        both = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
        try:
            full = (address[0], port, *address[2:])
            listeners.append(socket.create_server(full, family=family, backlog=_BACKLOG, dualstack_ipv6=both))
        except OSError as error:
            # Containers know ::1 by name, without having it.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                _close(listeners)
                raise
            missing = missing or error
    if not listeners and missing is not None:
        raise missing
    return listeners


def _on_path(path: Path, mode: int) -> socket.socket:
    """A listener on a unix socket; one that nobody serves any more gives way.

    Raises:
        ConfigError: something else is there, or there cannot be a socket. OSError: a server listens there.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        with _locked(path.parent):
            _make_room(path)
            # The mode holds from the first moment on.
            before = os.umask(0o777 & ~mode)
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
            listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise
        raise ConfigError(f"uds: {path}: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise
    return listener


def _make_room(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ConfigError(f"uds: {path} is there already, and is no socket; it was left as it is.")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_SECONDS_TO_CONNECT)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            # Something listens that takes no connection now, or not ours.
            pass
    raise OSError(errno.EADDRINUSE, f"Address already in use: another server listens on {path}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder: servers that start together check and bind one after the other."""
    descriptor = None
    with suppress(OSError, ImportError):
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _close(listeners: Sequence[socket.socket]) -> None:
    for listener in listeners:
        listener.close()
