"""Pictures of the page for the documents; `--write-pictures` keeps them in docs/pictures."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.browser.conftest import Opened, Opener

FOLDER = Path(__file__).parent.parent.parent / "docs" / "pictures"
MOST_BYTES = 150_000
SIZE = {"width": 1180, "height": 760}
SHOWN = {
    "page-similarity": ("similarity", "all-MiniLM-L6-v2", "light"),
    "page-words": ("words", "all-MiniLM-L6-v2", "dark"),
    "page-server": ("server", "all-MiniLM-L6-v2", "light"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_page_is_shown_in_the_documents(
    opened: Opener, url: str, name: str, request: pytest.FixtureRequest
) -> None:
    task, model, scheme = SHOWN[name]
    shown = opened(url, viewport=SIZE, color_scheme=scheme, reduced_motion="reduce").task(task, model)
    if task == "server":
        work(shown, url)
    else:
        shown.run()
    picture = shown.page.screenshot()
    assert len(picture) < MOST_BYTES
    if request.config.getoption("--write-pictures"):
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{name}.png").write_bytes(picture)
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def work(shown: Opened, url: str) -> None:
    """Requests of several sizes, so that there is something to read."""
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for number in range(60):
            texts = ["The moon pulls the sea towards it. " * (1 + number % 5)] * (1 + number % 7)
            client.post("/v1/embeddings", json={"model": "all-MiniLM-L6-v2", "input": texts}).raise_for_status()
            shown.page.wait_for_timeout(200)
