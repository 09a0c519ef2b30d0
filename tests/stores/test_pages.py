"""The Python of each page that names packages of its own, as `tests/docs/test_pages.py` runs the others."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from tests.cli.in_process import Run, said
from tests.docs.pages import PAGES, packages
from tests.docs.test_pages import folder, run_page, servers

__all__ = ["folder", "said", "servers"]  # fixtures

OURS = tuple(page for page in PAGES if packages(page))

missing = sorted({name for page in OURS for name in packages(page) if find_spec(name) is None})
if missing:
    raise pytest.UsageError(f"tests/stores needs {', '.join(missing)}: make test-stores installs them and runs it.")


@pytest.mark.parametrize("page", OURS)
def test_the_examples_of_a_page_run(
    page: str, folder: Path, servers: dict[str, httpx.Client], said: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, folder, servers, said, monkeypatch, python=True)
