"""Where the server listens: names and addresses of both kinds, and unix sockets that are its own alone."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from poolhouse.errors import ConfigError
from poolhouse.server.process.listening import Listeners
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.running import free_port
from tests.server.sockets import in_thread


def listeners(**options: object) -> Listeners:
    return Listeners(ServerSettings.parse(**options))


def reached(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture
def opened() -> Iterator[list[Listeners]]:
    some: list[Listeners] = []
    yield some
    for one in some:
        one.leave()
        for listener in one.sockets:
            listener.close()


@pytest.mark.parametrize(
    ("host", "answering", "silent", "address"),
    [
        ("127.0.0.1", ["127.0.0.1"], ["::1"], "http://127.0.0.1:{}"),
        ("0.0.0.0", ["127.0.0.1"], ["::1"], "http://127.0.0.1:{}"),
        ("::1", ["::1"], ["127.0.0.1"], "http://[::1]:{}"),
        ("[::1]", ["::1"], ["127.0.0.1"], "http://[::1]:{}"),
        ("::", ["::1", "127.0.0.1"], [], "http://[::1]:{}"),
        ("[::]", ["::1", "127.0.0.1"], [], "http://[::1]:{}"),
        ("", ["::1", "127.0.0.1"], [], "http://[::1]:{}"),
        (" localhost ", ["127.0.0.1"], [], None),
    ],
)
@pytest.mark.parametrize("chosen", [False, True], ids=["any port", "this port"])
def test_every_way_to_write_a_host_listens_there(
    opened: list[Listeners], host: str, answering: list[str], silent: list[str], address: str | None, chosen: bool
) -> None:
    one = listeners(host=host, port=free_port() if chosen else 0)
    opened.append(one)
    ports = {listener.getsockname()[1] for listener in one.sockets}
    assert len(ports) == 1
    port = ports.pop()
    assert {name: reached(name, port) for name in (*answering, *silent)} == {
        **dict.fromkeys(answering, True),
        **dict.fromkeys(silent, False),
    }
    assert one.to_all == (host.strip(" []") in ("0.0.0.0", "::", ""))
    if address is not None:
        assert one.address("http") == address.format(port)


def test_a_name_of_both_kinds_of_address_is_listened_on_with_each(
    opened: list[Listeners], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def both(host: str, *rest: object, **options: object) -> list[object]:
        assert host == "both.example"
        found = [*real("::1", *rest, **options), *real("127.0.0.1", *rest, **options)]  # type: ignore[arg-type]
        # And one that this machine does not have, as ::1 in many containers; and one of them twice.
        return [*found, *real("192.0.2.1", *rest, **options), found[0]]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    one = listeners(host="both.example", port=0)
    monkeypatch.undo()
    opened.append(one)
    port = one.sockets[0].getsockname()[1]
    assert (len(one.sockets), reached("::1", port), reached("127.0.0.1", port)) == (2, True, True)


def test_a_host_that_is_not_ours_is_an_error_in_words() -> None:
    with pytest.raises(ConfigError, match=r"host: there is no address nowhere\.invalid"):
        listeners(host="nowhere.invalid")
    with pytest.raises(OSError, match="assign"):
        listeners(host="192.0.2.1")


@pytest.mark.parametrize(
    ("written", "mode"), [(None, 0o600), ("660", 0o660), ("0666", 0o666), ("0o770", 0o770), ("000", 0)]
)
def test_the_mode_of_a_unix_socket_is_the_options(
    opened: list[Listeners], tmp_path: Path, written: str | None, mode: int
) -> None:
    path = tmp_path / "socket"
    before = os.umask(0o022)
    try:
        opened.append(listeners(uds=str(path), **({} if written is None else {"uds_mode": written})))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.lstat().st_mode) == mode


@pytest.mark.parametrize("mode", ["rw", "66", "888", "7777", ""])
def test_a_mode_that_is_none_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="uds_mode: permissions are three octal digits"):
        ServerSettings.parse(uds_mode=mode)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling", "fifo"])
def test_what_is_no_socket_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    other = tmp_path / "other"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        if kind == "link":
            other.write_text("precious")
        path.symlink_to(other)
    before = path.lstat()
    with pytest.raises(ConfigError, match=f"uds: {path} is there already, and is no socket"):
        listeners(uds=str(path))
    assert path.lstat() == before
    assert not path.is_file() or path.read_text() == "precious"


def test_a_socket_that_somebody_serves_is_not_taken_and_a_dead_one_is(opened: list[Listeners], tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = listeners(uds=str(path))
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        inode = path.lstat().st_ino
        with pytest.raises(OSError, match=f"another server listens on {path}") as caught:
            listeners(uds=str(path))
        assert (caught.value.errno, path.lstat().st_ino) == (errno.EADDRINUSE, inode)
        if kind == socket.SOCK_STREAM:
            # As a server leaves it that was killed.
            first.sockets[0].close()
            path.unlink()
            other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            other.bind(str(path))
    other.close()
    opened.append(listeners(uds=str(path)))
    path_of_killed = tmp_path / "killed"
    killed = listeners(uds=str(path_of_killed))
    killed.sockets[0].close()
    opened.append(listeners(uds=str(path_of_killed)))


def test_of_many_that_start_together_one_gets_the_socket(opened: list[Listeners], tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listeners(uds=str(path)).sockets[0].close()
    refused: list[OSError] = []

    def start() -> None:
        try:
            opened.append(listeners(uds=str(path)))
        except OSError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(opened), len(refused)) == (1, 7)
    assert opened[0].inode == (path.lstat().st_dev, path.lstat().st_ino)


def test_only_the_own_socket_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    settings = {"uds": str(path), "port": 0}
    with in_thread(FakeEngine(), **settings):
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
            assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 200
        path.unlink()
        path.write_text("of somebody else")
    assert path.read_text() == "of somebody else"
    path.unlink()
    with in_thread(FakeEngine(), **settings):
        path.unlink()
        second = listeners(uds=str(path))
    assert stat.S_ISSOCK(path.lstat().st_mode)
    second.leave()
    assert not path.exists()
    second.sockets[0].close()
    with in_thread(FakeEngine(), **settings):
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("path", ["no/such/folder/socket", "x" * 200], ids=["no folder", "too long"])
def test_a_path_where_no_socket_can_be_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=f"uds: {tmp_path / path}: "):
        listeners(uds=str(tmp_path / path))
