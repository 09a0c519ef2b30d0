"""Keys, CORS, TLS and the limits of a request's head, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from poolhouse.errors import ConfigError
from poolhouse.server.app import create_app
from poolhouse.server.security import api_keys, tls_options
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.running import Running, running

BODY = {"input": "hello"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# staff\nthird-key\n\n  fourth-key  \n")
    settings = {"api_key": ["first-key", "second,key"], "api_key_file": str(file), "log_level": "debug"}
    server = Running(**settings, allowed_origins=["https://a.example"]).ready()
    yield server
    status, log = server.stop()
    assert status == 0
    for key in ("first-key", "second,key", "third-key", "fourth-key"):
        assert key not in log


@pytest.fixture
def http(guarded: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, trust_env=False) as client:
        yield client


@pytest.mark.parametrize("key", ["first-key", "second,key", "third-key", "fourth-key"])
@pytest.mark.parametrize(
    "form", ["Authorization: Bearer {}", "authorization: bearer  {}", "X-Api-Key: {}", "api-key: {}"]
)
def test_a_key_opens_every_route(http: httpx.Client, key: str, form: str) -> None:
    name, value = form.format(key).split(": ", 1)
    assert http.post("/v1/embeddings", json=BODY, headers={name: value}).status_code == 200
    assert http.get("/v1/models", headers={name: value}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer first-ke"},
        {"Authorization": "Bearer first-key2"},
        {"Authorization": "Basic first-key"},
        {"Authorization": "first-key"},
        {"X-Api-Key": ""},
        {"X-Api-Key": "second"},
        {"Cookie": "api-key=first-key"},
    ],
)
def test_without_a_key_every_route_is_closed(http: httpx.Client, headers: dict[str, str]) -> None:
    paths = ["/v1/embeddings", "/pooling", "/metrics", "/version", "/v1/models", "/docs", "/openapi.json", "/nothing"]
    for path in (
        *paths,
        "/health/x",
        "/healthy",
        "//health",
        "/health/live/../../v1/models",
        "/v1/models?api-key=first-key",
    ):
        for method in ("GET", "POST"):
            # Joined by hand: httpx takes what follows two slashes for a host.
            reply = http.request(method, str(http.base_url).rstrip("/") + path, headers=headers)
            assert (reply.status_code, reply.content) == (401, b'{"error":"Unauthorized"}'), path
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.headers["content-type"] == "application/json"


def test_with_a_key_one_hears_that_there_is_no_such_route(http: httpx.Client) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/embeddings", 405), ("POST", "/health", 405)):
        reply = http.request(method, path, headers={"api-key": "first-key"})
        assert (reply.status_code, reply.json()["object"], reply.json()["code"]) == (status, "error", status)


def test_probes_and_preflights_need_no_key(http: httpx.Client) -> None:
    for path in ("/health", "/ping", "/health/live", "/health/ready"):
        assert http.get(path).status_code == 200
    asked = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    reply = http.options("/v1/embeddings", headers=asked)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://a.example")


def test_a_wrong_key_is_refused_before_the_body_is_read(guarded: Running) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")
        # The rest may come or not; it disturbs nobody.
        connection.sendall(b"x" * 200_000)
    assert httpx.get(f"{guarded.url}/health", trust_env=False).status_code == 200


def test_keys_show_nowhere(http: httpx.Client) -> None:
    models = http.get("/v1/models", headers={"api-key": "first-key"}).text
    assert "key" not in models
    settings = ServerSettings.parse(api_key="first-key", ssl_keyfile_password="secret")
    assert "first-key" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert "secret" not in f"{settings!r} {settings.model_dump_json()}"
    with pytest.raises(ConfigError) as caught:
        ServerSettings.parse(api_key=["first-key", "two\nlines"])
    assert "two" not in str(caught.value)


def test_the_openai_client_shows_its_key(guarded: Running) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="third-key") as client:
        assert client.embeddings.create(model="fake", input="x").data
    wrong = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with wrong as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_key_file_without_a_key_opens_no_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n# nobody\n")
    for file, words in ((tmp_path / "keys", "holds no key"), (tmp_path / "none", "No such file")):
        with pytest.raises(ConfigError, match=words):
            api_keys(ServerSettings(api_key_file=str(file)))
    for keys in ("[]", "", ",", [""], ["k", " "], [None]):
        with pytest.raises(ConfigError, match="api_key"):
            ServerSettings.parse(api_key=keys)
    assert api_keys(ServerSettings.parse(api_key="a, b,a")) == ("a", "b")


@pytest.mark.parametrize(("root_path", "path", "status"), [
    ("/api", "/health", 200), ("/api", "/api/health", 200), ("/api", "/api/v1/models", 401), ("/api", "/v1/models", 401),
])  # fmt: skip
def test_keys_hold_behind_a_proxys_prefix(root_path: str, path: str, status: int) -> None:
    with TestClient(create_app([FakeEngine()], ServerSettings.parse(api_key="k", root_path=root_path))) as client:
        assert client.get(path).status_code == status


def test_cors_is_off_unless_origins_are_given() -> None:
    origin = {"Origin": "https://a.example"}
    with TestClient(create_app([FakeEngine()])) as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
    named = ServerSettings.parse(allowed_origins='["https://a.example"]', api_key="k")
    with TestClient(create_app([FakeEngine()], named)) as client:
        # A browser shows a refusal to its page only where it carries this header.
        refused = client.get("/v1/models", headers=origin)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
        other = client.get("/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def certificate(folder: Path, name: str = "localhost") -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    folder.mkdir(exist_ok=True)
    files = str(folder / "certificate.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
               "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return files


def test_tls_serves_its_certificate_and_takes_a_renewed_one(tmp_path: Path) -> None:
    file, key = certificate(tmp_path)
    with running(ssl_certfile=file, ssl_keyfile=key, enable_ssl_refresh=True, api_key="k") as server:
        assert server.said.strip().endswith(server.url)
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=file)
        reply = httpx.post(
            f"{server.url}/v1/embeddings", json=BODY, verify=trusting, headers={"api-key": "k"}, trust_env=False
        )
        assert reply.status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{server.url}/health", trust_env=False)
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url.replace("https", "http") + "/health", trust_env=False)
        certificate(tmp_path, "renewed")
        renewed = ssl.create_default_context(cafile=file)
        for _ in range(300):
            try:
                assert httpx.get(f"{server.url}/health", verify=renewed, trust_env=False).status_code == 200
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        else:
            pytest.fail("The renewed certificate was not taken.")


def test_client_certificates_can_be_required(tmp_path: Path) -> None:
    file, key = certificate(tmp_path / "server")
    client_file, client_key = certificate(tmp_path / "client", "client")
    with running(ssl_certfile=file, ssl_keyfile=key, ssl_ca_certs=client_file, ssl_cert_reqs=2) as server:
        known = ssl.create_default_context(cafile=file)
        known.load_cert_chain(client_file, client_key)
        assert httpx.get(f"{server.url}/health", verify=known, trust_env=False).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health", verify=ssl.create_default_context(cafile=file), trust_env=False)


def test_half_of_tls_is_an_error_in_words(tmp_path: Path) -> None:
    for options, words in (
        ({"ssl_keyfile": "k"}, "needs a certificate"),
        ({"ssl_certfile": "/none.pem"}, "no file /none.pem"),
        ({"ssl_certfile": __file__, "ssl_cert_reqs": 2}, "ssl-ca-certs"),
    ):
        with pytest.raises(ConfigError, match=words):
            tls_options(ServerSettings.parse(**options))
    status, log = Running(ssl_certfile=__file__, ssl_keyfile=__file__).ended()
    assert status == 1
    assert "poolhouse: The TLS certificate, key or ciphers cannot be used" in log
    assert "Traceback" not in log


@pytest.fixture(scope="module", params=[False, True], ids=["httptools", "h11"])
def bounded(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(h11=request.param, header_timeout_seconds=1.0, max_header_bytes=20_000, max_url_bytes=1000) as server:
        yield server


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        ("/health?" + "x" * 900, b"", 200),
        ("/health?" + "x" * 1001, b"", 414),
        ("/health", b"X-Much: " + b"y" * 19_000, 200),
        ("/health", b"X-Much: " + b"y" * 21_000, 431),
        ("/health", b"X-Much: " + b"y" * 10_000_000, 431),
        ("/health", b"\r\n".join(b"X-%d: y" % n for n in range(500_000)), 431),
        ("/" + "x" * 10_000_000, b"", 431),
    ],
)  # fmt: skip
def test_the_head_of_a_request_is_bounded(bounded: Running, target: str, headers: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", bounded.port), timeout=20) as connection:
        head = (
            b"GET " + target.encode() + b" HTTP/1.1\r\nHost: x\r\n" + headers + (b"\r\n" if headers else b"") + b"\r\n"
        )
        try:
            connection.sendall(head)
            said = connection.recv(1000)
        except ConnectionError:
            # It was cut off while it still sent, which may lose the reply.
            assert status == 431
            return
    assert said.startswith(b"HTTP/1.1 %d " % status)


def test_clients_that_send_slowly_block_nobody_and_are_let_go(bounded: Running) -> None:
    async def dribble() -> float:
        """Seconds until the server has enough of a head that never ends."""
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", bounded.port)
        writer.write(b"GET /health HTTP/1.1\r\n")
        while not reader.at_eof() and time.monotonic() - started < 20:
            writer.write(b"X-Slow: 1\r\n")
            try:
                assert (await asyncio.wait_for(reader.read(100), 0.1)).startswith((b"HTTP/1.1 408 ", b""))
            except TimeoutError:
                continue
            break
        writer.close()
        return time.monotonic() - started

    async def both() -> list[float]:
        slow = [asyncio.create_task(dribble()) for _ in range(100)]
        async with httpx.AsyncClient(base_url=bounded.url, trust_env=False) as client:
            for _ in range(5):
                assert (await client.get("/health")).status_code == 200
        return await asyncio.gather(*slow)

    assert max(asyncio.run(both())) < 10


def test_a_connection_lives_through_many_requests_and_a_long_body(bounded: Running) -> None:
    """The clock of heads must not run between requests, nor within a body."""
    with socket.create_connection(("127.0.0.1", bounded.port), timeout=20) as connection:
        body = b'{"input":"hello"}'
        for _ in range(2):
            connection.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(body)
            )
            time.sleep(1.3)
            connection.sendall(body)
            said = connection.recv(10_000)
            while not said.endswith(b"}}"):
                said += connection.recv(10_000)
            assert said.startswith(b"HTTP/1.1 200 ")
            time.sleep(1.3)
