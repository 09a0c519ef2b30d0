"""The page over HTTP: who gets it, what its headers forbid, and when it is not there. tests/browser opens it."""

from __future__ import annotations

import hashlib
import re
import signal
import tomllib

import httpx
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.testclient import TestClient

from poolhouse.server.app import create_app
from poolhouse.server.page import FILES
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.docs.pages import ROOT
from tests.server.running import Running

# What Chromium, Firefox and Safari send for an address that is typed.
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
NAMES = sorted(FILES)


def client(**settings: object) -> TestClient:
    return TestClient(create_app([FakeEngine()], ServerSettings.parse(**settings)), follow_redirects=False)


@pytest.mark.parametrize(
    ("accept", "shown"),
    [
        (BROWSER["accept"], True),
        ("text/html", True),
        ("application/json;q=0.9, TEXT/HTML ;q=0.1", True),
        (None, False),
        ("*/*", False),
        ("", False),
        ("application/json", False),
        ("text/*", False),
        ("text/html;q=0", False),
        ("text/html; q=0.0, */*", False),
        ("text/htmlx", False),
    ],
)
def test_browsers_get_the_page_and_probes_their_empty_answer(accept: str | None, shown: bool) -> None:
    with client() as http:
        http.headers.pop("accept")
        reply = http.get("/", headers={} if accept is None else {"accept": accept})
        assert reply.status_code == 200
        assert (reply.text.startswith("<!DOCTYPE html>"), reply.content == b"") == (shown, not shown)
        assert (reply.headers.get("vary") == "Accept") == shown


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_served_with_headers_that_keep_everything_here(name: str) -> None:
    with client() as http:
        reply = http.get(name, headers=BROWSER)
        assert (reply.status_code, reply.content) == (200, FILES[name].content)
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
        assert policy.pop("img-src") == "'self' data: blob:"
        assert set(policy) >= {"default-src", "script-src", "style-src", "connect-src", "form-action", "base-uri"}
        assert set(policy.values()) == {"'none'", "'self'"}
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["cache-control"] == "no-cache"
        tag = reply.headers["etag"]
        for known in (tag, f"W/{tag}", f'"another", {tag}'):
            again = http.get(name, headers={**BROWSER, "if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert http.get(name, headers={**BROWSER, "if-none-match": '"another"'}).status_code == 200
        head = http.head(name, headers=BROWSER)
        assert (head.status_code, head.content, head.headers["content-length"]) == (
            200,
            b"",
            reply.headers["content-length"],
        )


def test_the_files_are_small_and_name_nothing_elsewhere() -> None:
    own = {name: file for name, file in FILES.items() if "/vendor/" not in name}
    assert sum(len(file.content) for file in own.values()) < 100_000
    for name, file in own.items():
        text = file.content.decode()
        allowed = {"http://www.w3.org/2000/svg"}
        assert set(re.findall(r"https?://[\w./-]+", text)) <= allowed, name
        # What is shown is set as text, never read as markup.
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "DOMParser",
        ):
            assert word not in text, f"{name}: {word}"
    page = FILES["/"].content.decode()
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    assert named - {"docs"} <= {path[1:] for path in FILES}
    # Without a policy for them, inline scripts and styles would be dead.
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on\w+=", page)
    imported = {name for file in FILES.values() for name in re.findall(r'from "\./([\w.]+)"', file.content.decode())}
    assert {f"/page/{name}" for name in imported} <= set(FILES)


def test_vendored_files_are_those_of_their_release_and_have_their_licence() -> None:
    """The hashes are those of dist/uPlot.iife.min.js, dist/uPlot.min.css and LICENSE in uplot 1.6.32 of the npm registry."""
    vendored = {name: file.content for name, file in FILES.items() if "/vendor/" in name}
    assert {
        name.removeprefix("/page/vendor/"): hashlib.sha256(content).hexdigest() for name, content in vendored.items()
    } == {
        "uPlot.LICENSE.txt": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
        "uPlot.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        "uPlot.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    }
    view = FILES["/page/server.js"].content.decode()
    (version,) = re.findall(rb"uPlot \(v([\d.]+)\)", vendored["/page/vendor/uPlot.js"])
    assert f"uPlot {version.decode()}, " in view
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0 AND MIT"
    assert "src/poolhouse/server/page/vendor/*.LICENSE.txt" in project["license-files"]


@pytest.mark.parametrize(
    "path",
    ["/page", "/page/", "/page/nothing.js", "/page/index.html", "/page/__init__.py", "/page/../app.py",
     "/page/%2e%2e/app.py", "/page//app.js", "/page/app.js/", "/page/APP.JS"],
)  # fmt: skip
def test_only_known_names_are_served(path: str) -> None:
    with client() as http:
        assert http.get(path, headers=BROWSER).status_code == 404


def test_other_methods_go_to_the_routes() -> None:
    with client() as http:
        assert http.post("/", json={"inputs": "a"}, headers=BROWSER).status_code == 200
        assert http.post("/page/app.js", headers=BROWSER).status_code == 404
        assert http.put("/", headers=BROWSER).status_code == 405


def test_the_page_needs_no_key_and_its_calls_do() -> None:
    with client(api_key=(SecretStr("secret"),)) as http:
        assert [http.get(name, headers=BROWSER).status_code for name in NAMES] == [200] * len(NAMES)
        assert [http.get(path).status_code for path in ("/v1/models", "/version", "/metrics", "/docs")] == [401] * 4
        assert http.get("/page/nothing.js").status_code == 401


@pytest.mark.parametrize("keys", [(), (SecretStr("secret"),)])
def test_without_the_page_all_is_as_before(keys: tuple[SecretStr, ...]) -> None:
    settings = {"api_key": keys} if keys else {}
    with client(page=False, **settings) as http:
        reply = http.get("/", headers=BROWSER)
        assert (reply.status_code, reply.content) == (200, b"")
        expected = 401 if keys else 404
        assert {http.get(name, headers=BROWSER).status_code for name in NAMES if name != "/"} == {expected}


@pytest.mark.parametrize("root", ["/pool", "/a/b"])
def test_a_prefix_gets_a_slash_behind_for_names_are_relative_to_it(root: str) -> None:
    with client(root_path=root) as http:
        moved = http.get(root, headers=BROWSER)
        assert (moved.status_code, moved.headers["location"]) == (307, f"{root}/")
        for path in ("/", f"{root}/"):
            assert http.get(path, headers=BROWSER).content == FILES["/"].content
        for path in ("/page/app.js", f"{root}/page/app.js"):
            assert http.get(path).content == FILES["/page/app.js"].content
        assert http.get(root).content == b""


def test_a_mounted_application_has_its_page_too() -> None:
    app = Starlette()
    app.mount("/pool", create_app([FakeEngine()]))
    with TestClient(app) as http:
        assert http.get("/pool", headers=BROWSER).content == FILES["/"].content
        assert http.get("/pool/page/style.css").content == FILES["/page/style.css"].content


def test_a_dead_engine_still_has_a_page_but_is_not_healthy() -> None:
    engine = FakeEngine()
    with TestClient(create_app([engine])) as http:
        engine.alive = False
        assert http.get("/", headers=BROWSER).status_code == 200
        assert http.get("/").status_code == 503


@pytest.mark.parametrize("page", [True, False])
def test_while_models_load_the_page_is_there_and_the_rest_is_not(page: bool) -> None:
    server = Running("sys.stdin.readline()\n    engines = [FakeEngine('held')]", stdin=True, page=page).listening()
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        assert http.get("/", headers=BROWSER).status_code == (200 if page else 503)
        assert http.get("/page/app.js").status_code == (200 if page else 503)
        head = http.head("/", headers=BROWSER)
        assert (head.status_code, head.content) == (200 if page else 503, b"")
        assert (http.get("/").status_code, http.get("/v1/models").status_code) == (503, 503)
        assert server.process.stdin is not None
        server.process.stdin.write("now\n")
        server.process.stdin.flush()
        server.ready()
        assert http.get("/v1/models").status_code == 200
    server.process.send_signal(signal.SIGTERM)
    status, log = server.ended()
    assert (status, "Traceback" in log) == (0, False), log


def test_the_metrics_name_files_of_the_page_by_their_paths() -> None:
    with client() as http:
        http.get("/", headers=BROWSER)
        http.get("/page/app.js")
        http.get("/page/nothing.js")
        text = http.get("/metrics").text
    for route in ("/", "/page/app.js"):
        assert f'poolhouse_requests_total{{model="",route="{route}",status="200"}} 1.0' in text
    assert 'route="/page/nothing.js"' not in text
