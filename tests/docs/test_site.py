"""The site has every page, and the links that `tests/docs/site.py` changes lead somewhere there; `make site` builds it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.docs import site
from tests.docs.pages import ROOT


class _Loader(yaml.SafeLoader):
    """Names of functions in mkdocs.yml, such as those that make anchors, are left alone."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def test_every_page_stands_in_the_navigation_once(tmp_path: Path) -> None:
    site.write(tmp_path)
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)["nav"]
    named = [page for entry in navigation for page in _pages(entry)]
    assert sorted(named) == sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md"))


def _pages(entry: dict[str, object]) -> list[str]:
    (value,) = entry.values()
    return [value] if isinstance(value, str) else [page for inner in value for page in _pages(inner)]  # type: ignore[attr-defined]


def test_links_lead_to_pages_of_the_site(tmp_path: Path) -> None:
    site.write(tmp_path)
    for page in tmp_path.rglob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)\s#]+)[^)\s]*\)", page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            assert path.is_relative_to(tmp_path.resolve()), f"{page.name}: {target}"
            assert path.exists(), f"{page.name}: {target}"


def test_what_belongs_to_an_item_is_indented_twice_as_far() -> None:
    text = "- one\n  - two\n\n  ```yaml\n  a:\n    b: 1\n  ```\n\n```python\nif a:\n    b\n```\n"
    assert site.nested(text) == (
        "- one\n    - two\n\n    ```yaml\n    a:\n      b: 1\n    ```\n\n```python\nif a:\n    b\n```\n"
    )
