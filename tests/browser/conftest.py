"""A real browser on real servers; each test fails for anything that the page asks elsewhere, or says in the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.docs.checkpoints import lay_out
from tests.models.test_hosted_pictures import idefics3
from tests.server.running import served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without --browser there is nothing to test with."""
    return None if config.getoption("--browser") else True


MODELS = (
    "all-MiniLM-L6-v2",
    "classifier",
    "reranker",
    "ner",
    "splade",
    "colbert",
    "colqwen3",
    "bge-m3",
    "with-prompts",
    "gliner",
    "gliclass",
    "nli",
    "colidefics3",
)
# Tasks with a model that can do them.
TASKS = [
    *(
        ("similarity", "all-MiniLM-L6-v2"),
        ("rerank", "all-MiniLM-L6-v2"),
        ("words", "all-MiniLM-L6-v2"),
        ("map", "all-MiniLM-L6-v2"),
        ("server", "all-MiniLM-L6-v2"),
    ),
    *(
        ("labels", "classifier"),
        ("rerank", "reranker"),
        ("entities", "ner"),
        ("sparse", "splade"),
        ("sparse", "bge-m3"),
    ),
    *(("words", "colbert"), ("pictures", "colqwen3"), ("pictures", "colidefics3"), ("similarity", "with-prompts")),
    *(("entities", "gliner"), ("labels", "gliclass"), ("labels", "nli")),
]


@pytest.fixture(scope="session")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=request.config.getoption("--browser"),
            args=["--no-sandbox", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of models of every kind."""
    home = tmp_path_factory.mktemp("models")
    lay_out(home)
    (home / "path" / "to" / "colidefics3").mkdir()
    idefics3("ColIdefics3").save(home / "path" / "to" / "colidefics3")
    (home / "path" / "to" / "all-MiniLM-L6-v2").symlink_to(home / "path" / "to" / "model")
    words = [f"path/to/{name}" for name in MODELS]
    with served(home, *words, "--served-model-name", *MODELS) as client:
        yield str(client.base_url).rstrip("/")


class Opened:
    """A page, and what it asked and said. allowed: parts of console messages that are expected."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.asked: list[Request] = []
        self.said: list[str] = []
        self.allowed: list[str] = []
        page.on("request", lambda request: self.asked.append(request))
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.said.append(message.text)

    def task(self, task: str, model: str) -> Opened:
        """Show a task of a model."""
        self.page.goto(f"{self.origin}/#{task}/{model}")
        self.page.locator(f"nav a[aria-current=page][href='#{task}/{model}']").wait_for()
        return self

    def run(self) -> Opened:
        """Press Run, and wait for what comes."""
        self.page.get_by_role("button", name="Run").click()
        return self.done()

    def done(self) -> Opened:
        """Wait until nothing runs."""
        self.page.locator(".calls:not([hidden]), .result .problem").first.wait_for(timeout=60_000)
        self.page.locator(".output:not([aria-busy])").wait_for()
        return self

    def unfold(self, title: str) -> None:
        """Open the first part of that title; what is in it is made then."""
        part = self.page.locator("details.folded", has=self.page.get_by_text(title, exact=True)).first
        part.locator("summary").click()
        part.locator(":scope > :nth-child(2)").wait_for()

    def texts(self, selector: str) -> list[str]:
        """The text of each element, as it is seen."""
        return self.page.locator(selector).all_inner_texts()

    def check(self) -> None:
        """All was asked of its own server, and nothing went wrong that was not expected."""
        origins = {f"{(parts := urlsplit(one.url)).scheme}://{parts.netloc}" for one in self.asked}
        assert origins - {"data://", "blob://"} <= {self.origin}
        assert [one for one in self.said if not any(part in one for part in self.allowed)] == []


Opener = Callable[..., Opened]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opener]:
    """Opens pages: `opened(url)`, with options of a browser's context."""
    with ExitStack() as stack:

        @contextmanager
        def page(origin: str, **options: Any) -> Iterator[Opened]:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            shown = Opened(context.new_page(), origin)
            try:
                yield shown
                shown.check()
            finally:
                context.close()

        yield lambda origin, **options: stack.enter_context(page(origin, **options))
