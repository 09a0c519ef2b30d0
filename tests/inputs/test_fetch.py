"""Fetching by the policy: each rule against a server on this machine, or against names that a false resolver knows."""

from __future__ import annotations

import base64
import logging
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from poolhouse.errors import ConfigError, FetchFailed, InvalidRequest
from poolhouse.inputs.media.fetch import Fetcher, FetchPolicy, is_remote, read_local
from tests.inputs.sources import Answer, Source, redirect, source, whole

PATH = "documents[2].content[0]"
BODY = b"pixels " * 100
LOCAL = FetchPolicy(("127.0.0.1",))


def fetched(url: str, policy: FetchPolicy = LOCAL, names: dict[str, Sequence[str]] | None = None) -> bytes:
    """names: what a false resolver knows; none: the machine's own."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        assert names is not None
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return names[host]

    fetcher = Fetcher(policy, None if names is None else resolve)
    try:
        return fetcher.fetch(url, PATH).result(20)
    finally:
        fetcher.close()


def refused(url: str, reason: str, policy: FetchPolicy = LOCAL, names: dict[str, Sequence[str]] | None = None) -> str:
    """The text of the error for a URL that is not asked."""
    return _text(InvalidRequest, url, reason, policy, names)


def failed(url: str, reason: str, policy: FetchPolicy = LOCAL, names: dict[str, Sequence[str]] | None = None) -> str:
    """The text of the error for a fetch that did not succeed."""
    return _text(FetchFailed, url, reason, policy, names)


def _text(
    kind: type[InvalidRequest], url: str, reason: str, policy: FetchPolicy, names: dict[str, Sequence[str]] | None
) -> str:
    with pytest.raises(InvalidRequest, match=reason) as raised:
        fetched(url, policy, names)
    assert type(raised.value) is kind
    assert raised.value.parameter == PATH
    text = str(raised.value)
    assert text.startswith(f"{PATH}: Failed to fetch the picture")
    return text


@pytest.fixture
def pictures() -> Iterator[Source]:
    answers: dict[str, bytes | Answer] = {
        "/a.png": BODY,
        "/moved": redirect("/a.png"),
        "/seen": redirect("a.png", 307),
        "/empty": b"",
        "/many": whole(bytes(2000)),
        "/chunked": _chunked,
        "/gzip": whole(BODY, Content_Encoding="gzip"),
        "/short": whole(BODY[:10], Content_Length="700"),
        "/error": whole(b"the secret body", 500),
        "/forbidden": whole(b"the secret body", 403),
        "/silent": lambda _: time.sleep(3),
        "/drip": _drip,
        "/dripping-headers": _drip_of_headers,
        "/circle": redirect("/circle"),
        **{f"/hop{left}": redirect(f"/hop{left - 1}") for left in range(1, 5)},
        "/hop0": BODY,
    }
    with source(answers) as served:
        yield served


def _chunked(handler: BaseHTTPRequestHandler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b"64\r\n" + bytes(100) + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def _drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def _drip_of_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for _ in range(60):
        handler.wfile.write(b"X-More: yes\r\n")
        time.sleep(0.05)


def test_a_named_host_is_asked_over_http_and_on_any_port(pictures: Source) -> None:
    assert fetched(pictures.url("/a.png")) == BODY
    assert fetched(pictures.url("/a.png?width=3#part")) == BODY
    assert fetched(pictures.url("/empty")) == b""
    assert fetched(pictures.url("/a.png", scheme="HTTP")) == BODY
    assert pictures.asked[:2] == [
        ("/a.png", f"127.0.0.1:{pictures.port}"),
        ("/a.png?width=3", f"127.0.0.1:{pictures.port}"),
    ]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "127.1", "2130706433", "0x7f.0.0.1", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]"],
)
def test_this_machine_is_not_asked_by_default(host: str, pictures: Source) -> None:
    # Port 80: other ports are refused before the address is looked at.
    refused(f"http://{host}/a.png", "an address that is not public|URL cannot be read|host is not found", FetchPolicy())
    refused(
        pictures.url("/a.png", host),
        "only hosts of allowed_media_domains are asked on other ports|cannot be read",
        FetchPolicy(),
    )
    assert pictures.asked == []


PRIVATE = [
    *("10.0.0.1", "172.16.3.4", "192.168.1.1", "127.0.0.53", "0.0.0.0", "100.64.0.1", "169.254.169.254", "192.0.2.7"),
    *("168.63.129.16", "100.100.100.200", "192.0.0.192", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
    *("::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2001:0:a00:1::1", "::ffff:0:10.0.0.1"),
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_names_of_addresses_that_are_not_public_are_refused(address: str) -> None:
    text = refused(
        "https://pictures.test/a.png", "an address that is not public", FetchPolicy(), {"pictures.test": [address]}
    )
    assert address not in text
    refused("https://pictures.test/", "not public", FetchPolicy(), {"pictures.test": ["93.184.215.14", address]})


def test_a_public_address_is_asked_for_at_that_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is looked up once, so it cannot change between the check and the connection."""
    looked_up, connected = [], []

    async def resolve(host: str, port: int) -> Sequence[str]:
        looked_up.append((host, port))
        return ["93.184.215.14"] if len(looked_up) == 1 else ["127.0.0.1"]

    import anyio

    async def connect(remote_host: str, remote_port: int, **_: object) -> object:
        connected.append((remote_host, remote_port))
        raise OSError("no way there")

    monkeypatch.setattr(anyio, "connect_tcp", connect)
    fetcher = Fetcher(FetchPolicy(), resolve)
    with pytest.raises(FetchFailed, match="no connection"):
        fetcher.fetch("http://pictures.test/a.png", PATH).result(10)
    fetcher.close()
    assert (looked_up, connected) == ([("pictures.test", 80)], [("93.184.215.14", 80)])


def test_the_next_address_is_asked_where_one_does_not_answer(pictures: Source) -> None:
    policy = FetchPolicy(("pictures.test",), connect_seconds=0.5)
    url = pictures.url("/a.png", "pictures.test")
    assert fetched(url, policy, {"pictures.test": ["::1", "127.0.0.1"]}) == BODY
    assert pictures.asked == [("/a.png", f"pictures.test:{pictures.port}")]


def test_only_named_hosts_are_asked_where_there_are_any(pictures: Source) -> None:
    policy = FetchPolicy(("Pictures.TEST.", "::1", "bücher.test"))
    names = {
        name: ["127.0.0.1"] for name in ("pictures.test", "pictures.test.", "more.pictures.test", "xn--bcher-kva.test")
    }
    for host in ("pictures.test", "PICTURES.test", "pictures.test.", "bücher.test", "xn--bcher-kva.test"):
        assert fetched(pictures.url("/a.png", host), policy, names) == BODY
    for host in ("127.0.0.1", "more.pictures.test", "example.com", "pictures.test.evil.com"):
        refused(pictures.url("/a.png", host), "its host is not one of allowed_media_domains", policy, names)
    failed("http://[0:0:0:0:0:0:0:1]:9/a.png", "no connection", policy, {"0:0:0:0:0:0:0:1": ["::1"]})


@pytest.mark.parametrize("domain", ["http://host", "host/path", "host:80", "*.host", "user@host", "", "two hosts"])
def test_domains_are_names_alone(domain: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed_media_domains: .* is no host name"):
        FetchPolicy((domain,))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:secret@127.0.0.1/a.png", "holds a user name or a password"),
        ("http://127.0.0.1@evil.test/a.png", "holds a user name or a password"),
        ("http://@127.0.0.1/a.png", "holds a user name or a password"),
        ("http://127.0.0.1\\@evil.test/a.png", "blanks, backslashes or control characters"),
        ("http://127.0.0.1/a\r\nHost: evil.test", "blanks, backslashes or control characters"),
        ("http://127.0.0.1/a b", "blanks, backslashes or control characters"),
        ("http://127.0.0.1/\x00", "blanks, backslashes or control characters"),
        ("http://127.0.0.1/\u202e", "blanks, backslashes or control characters"),
        ("http:///a.png", "no http or https URL|cannot be read"),
        ("http:a.png", "no http or https URL"),
        ("http://127.0.0.1:99999/", "a host and a port that exist|cannot be read"),
        ("http://0177.0.0.1/", "URL cannot be read"),
        ("http://[::1/", "URL cannot be read"),
        ("http://" + "a" * 70000 + ".test/", "URL cannot be read"),
    ],
)  # fmt: skip
def test_urls_that_parsers_read_differently_are_refused(url: str, reason: str) -> None:
    text = refused(url, reason)
    assert "secret" not in text
    assert "evil" not in text
    assert len(text) < 300


def test_redirects_are_followed_within_the_policy(pictures: Source) -> None:
    assert fetched(pictures.url("/moved")) == BODY
    assert fetched(pictures.url("/seen")) == BODY
    assert fetched(pictures.url("/hop3")) == BODY
    failed(pictures.url("/hop4"), r"more than 3 redirects \(media_redirects\)")
    failed(pictures.url("/circle"), "more than 3 redirects")
    failed(pictures.url("/moved"), "more than 0 redirects", FetchPolicy(("127.0.0.1",), max_redirects=0))


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.2/a.png", "its host is not one of allowed_media_domains"),
        ("http://127.0.0.1@inside.test/", "a user name or a password"),
        ("//inside.test/a.png", "not one of allowed_media_domains"),
        ("file:///etc/passwd", "no http or https URL"),
        ("ftp://127.0.0.1/a.png", "no http or https URL"),
        ("http://127.0.0.1\\.inside.test/", "backslashes"),
    ],
)
def test_each_redirect_is_checked_as_the_first_url_is(location: str, reason: str) -> None:
    with source({"/": redirect(location)}) as served:
        text = refused(served.url("/?token=secret"), reason)
        assert "secret" not in text
        assert "inside" not in text or "http://inside.test" in text


def test_a_redirect_of_a_public_host_does_not_lead_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stranger's host would do it. The connection to its public address is bent to a server on this machine."""
    import anyio

    connect = anyio.connect_tcp
    with source({"/": redirect("http://inside.test/"), "/port": redirect("http://outside.test:8080/")}) as served:

        async def bent(remote_host: str, remote_port: int, **options: object) -> object:
            assert (remote_host, remote_port) == ("93.184.215.14", 80)
            return await connect("127.0.0.1", served.port, **options)

        monkeypatch.setattr(anyio, "connect_tcp", bent)
        names = {"outside.test": ["93.184.215.14"], "inside.test": ["10.1.2.3"]}
        refused("http://outside.test/", "from http://inside.test: .* not public", FetchPolicy(), names)
        refused("http://outside.test/port", "on other ports", FetchPolicy(), names)
        assert served.asked == [("/", "outside.test"), ("/port", "outside.test")]


def test_bytes_are_counted_as_they_come(pictures: Source) -> None:
    policy = FetchPolicy(("127.0.0.1",), max_bytes=len(BODY))
    assert fetched(pictures.url("/a.png"), policy) == BODY
    for path in ("/many", "/chunked"):
        failed(pictures.url(path), rf"more than {len(BODY)} bytes \(max_image_bytes\)", policy)


def test_answers_that_are_no_file_fail_without_their_body(pictures: Source) -> None:
    for path, reason in (
        ("/nowhere", "HTTP 404 error"),
        ("/error", "HTTP 500 error"),
        ("/forbidden", "HTTP 403 error"),
        ("/gzip", r"the answer is compressed \(gzip\)"),
        ("/short", "the connection broke off"),
    ):
        text = failed(pictures.url(f"{path}?key=abcd"), f"from http://127.0.0.1: {reason}")
        assert "secret" not in text
        assert "abcd" not in text


@pytest.mark.parametrize("path", ["/silent", "/drip", "/dripping-headers"])
def test_slow_sources_meet_the_total_deadline(path: str, pictures: Source) -> None:
    begun = time.monotonic()
    policy = FetchPolicy(("127.0.0.1",), total_seconds=0.4)
    failed(pictures.url(path), r"no whole answer within 0.4 seconds \(media_seconds\)", policy)
    assert time.monotonic() - begun < 1.5


def test_slow_names_meet_the_total_deadline() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        import asyncio

        await asyncio.sleep(5)
        return []

    fetcher = Fetcher(FetchPolicy(total_seconds=0.2), resolve)
    with pytest.raises(FetchFailed, match=r"0\.2 seconds"):
        fetcher.fetch("https://pictures.test/", PATH).result(2)
    fetcher.close()


def test_a_host_that_does_not_take_connections_fails_soon() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        port = full.getsockname()[1]
        failed(f"http://127.0.0.1:{port}/a.png", r"from http://127.0.0.1: no connection \(")
        # Nobody accepts, and what waits to be accepted is full.
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        policy = FetchPolicy(("127.0.0.1",), connect_seconds=0.3)
        failed(f"http://127.0.0.1:{port}/a.png", r"no connection within 0.3 seconds \(media_connect_seconds\)", policy)
        for one in waiting:
            one.close()


def test_unknown_hosts_fail() -> None:
    failed("https://nobody.test/a.png", "from https://nobody.test: its host is not found", FetchPolicy(), {})
    failed("https://nobody.test/a.png", "its host is not found", FetchPolicy(), {"nobody.test": []})


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's certificate for pictures.test, which this process trusts."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.test"]
    command += ["-addext", "subjectAltName=DNS:pictures.test", "-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    return context


def test_tls_names_and_checks_the_host_not_the_address(certificate: ssl.SSLContext) -> None:
    names_of_tls = []
    certificate.sni_callback = lambda _, name, __: names_of_tls.append(name)
    policy = FetchPolicy(("pictures.test", "other.test"))
    names = {"pictures.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]}
    answers: dict[str, bytes | Answer] = {"/a.png": BODY}
    with source(answers, certificate) as served:
        answers["/down"] = redirect(served.url("/a.png", "pictures.test", "http"))
        assert fetched(served.url("/a.png", "pictures.test", "https"), policy, names) == BODY
        assert served.asked == [("/a.png", f"pictures.test:{served.port}")]
        failed(served.url("/a.png", "other.test", "https"), "no connection .*certificate", policy, names)
        failed(served.url("/down", "pictures.test", "https"), "leads from https to http", policy, names)
    assert names_of_tls == ["pictures.test", "other.test", "pictures.test"]


def test_proxies_of_the_environment_are_not_asked(pictures: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    with source({}) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        assert fetched(pictures.url("/a.png")) == BODY
        assert proxy.asked == []


def test_logs_hold_no_urls(pictures: Source, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert fetched(pictures.url("/a.png?signature=secret")) == BODY
    assert "secret" not in caplog.text


def test_a_cancelled_fetch_lets_its_source_go() -> None:
    asked, gone = threading.Event(), threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        if handler.connection.recv(1) == b"":
            gone.set()

    with source({"/": answer}) as served:
        fetcher = Fetcher(LOCAL)
        future = fetcher.fetch(served.url("/"), PATH)
        assert asked.wait(5)
        future.cancel()
        assert gone.wait(5)
        fetcher.close()


def test_a_closed_fetcher_cancels_what_runs_and_ends_its_thread() -> None:
    asked = threading.Event()

    def answer(_: BaseHTTPRequestHandler) -> None:
        asked.set()
        time.sleep(2)

    with source({"/": answer}) as served:
        before = set(threading.enumerate())
        fetcher = Fetcher(LOCAL)
        future = fetcher.fetch(served.url("/"), PATH)
        (thread,) = (one for one in set(threading.enumerate()) - before if one.name == "poolhouse-fetch")
        assert asked.wait(5)
        fetcher.close()
        with pytest.raises(CancelledError):
            future.result(5)
        thread.join(5)
        assert not thread.is_alive()
        assert fetcher.fetch(served.url("/"), PATH).cancelled()


def test_many_sources_are_asked_at_once() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        whole(BODY)(handler)

    with source({"/": answer}) as served:
        fetcher = Fetcher(LOCAL)
        begun = time.monotonic()
        futures = [fetcher.fetch(served.url("/"), PATH) for _ in range(16)]
        assert {future.result(10) for future in futures} == {BODY}
        assert time.monotonic() - begun < 2
        fetcher.close()


# --- data URIs and files ---


def read(uri: str | Path, policy: FetchPolicy | None = None, any_file: bool = False) -> bytes:
    return read_local(uri, PATH, policy or FetchPolicy(), any_file)


def test_data_uris_are_base64_whatever_type_they_name() -> None:
    text = base64.b64encode(BODY).decode()
    for header in ("data:image/png;base64,", "DATA:;BASE64,", "data:text/html;charset=utf-8;base64,", "data:;base64,"):
        assert read(header + text) == BODY
    for wrong in ("data:image/png,abc", "data:image/png;base64", "data:", "data:image/png;base64;,abc"):
        with pytest.raises(InvalidRequest, match="a data URI of a picture is written data:image/"):
            read(wrong)
    with pytest.raises(InvalidRequest, match="not valid base64"):
        read("data:;base64," + text[:-3])
    with pytest.raises(InvalidRequest, match=r"more than 699 bytes \(max_image_bytes\)"):
        read("data:;base64," + text, FetchPolicy(max_bytes=699))


def test_other_schemes_are_refused_in_vllms_words() -> None:
    for uri in ("ftp://127.0.0.1/a.png", "s3://bucket/a.png", "gopher://x", "javascript:alert(1)", "blob:abc"):
        with pytest.raises(InvalidRequest, match="The URL must be either a HTTP, data or file URL"):
            read(uri)
    assert is_remote("HTTPS://host/")
    assert not any(map(is_remote, ("data:http:", "file:", b"http:", "httpx:", "a.png")))


def test_files_are_refused_by_default_whatever_way_they_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(BODY)
    for name in (str(file), file.as_uri(), "file:" + str(file), "a.png", "", "~/a.png", "no such file"):
        with pytest.raises(InvalidRequest, match="files are not read"):
            read(name)


def test_files_below_the_allowed_folder_are_read(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside.png"
    (folder / "deep").mkdir(parents=True)
    for file in (folder / "deep" / "ä b.png", outside):
        file.write_bytes(BODY)
    (folder / "link.png").symlink_to(folder / "deep" / "ä b.png")
    (folder / "way out.png").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    policy = FetchPolicy(local_folder=folder)
    inside = folder / "deep" / "ä b.png"
    for name in (str(inside), inside.as_uri(), f"file://localhost{folder}/link.png", f"{folder}/deep/../link.png"):
        assert read(name, policy) == BODY
    beyond = "outside of the folder that allowed_local_media_path opens"
    for name, reason in (
        (str(outside), beyond),
        (outside.as_uri(), beyond),
        (f"{folder}/../outside.png", beyond),
        (f"file://{folder}/%2e%2e/outside.png", beyond),
        (f"{folder}/way out.png", beyond),
        (f"{folder}/up/outside.png", beyond),
        ("/etc/hostname", beyond),
        (f"{folder}er/a.png", beyond),
        (f"{folder}/pipe", "no regular file"),
        (str(folder), "no regular file"),
        (f"{folder}/none.png", "No such file"),
        (f"{folder}/nul\0.png", "cannot be read"),
        (f"file://elsewhere{inside}", "names a file of this machine"),
    ):
        with pytest.raises(InvalidRequest, match=reason) as raised:
            read(name, policy)
        assert str(tmp_path) not in str(raised.value)
    with pytest.raises(InvalidRequest, match="more than 9 bytes"):
        read(str(inside), FetchPolicy(local_folder=folder, max_bytes=9))
    with pytest.raises(ConfigError, match="there is no folder"):
        FetchPolicy(local_folder=folder / "none")


def test_code_of_this_process_reads_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a: b.png"
    file.write_bytes(BODY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(file), file.as_uri(), "a: b.png", "~/a: b.png"):
        assert read(name, any_file=True) == BODY
    assert read(file) == BODY
    with pytest.raises(InvalidRequest, match="the file cannot be read: No such file"):
        read("none.png", any_file=True)
    with pytest.raises(InvalidRequest, match="no regular file"):
        read(Path("/dev/zero"))
