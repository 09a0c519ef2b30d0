"""What CONTRIBUTING.md, the Makefile, the hooks and the changelog say is true of the repository."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess

import yaml

import poolhouse
from tests.cli.in_process import Run, said
from tests.docs.pages import ROOT
from tests.test_layering import LINES

__all__ = ["said"]  # a fixture


def test_the_version_stands_in_one_place(said: Run) -> None:
    version = poolhouse.__version__
    assert importlib.metadata.version("poolhouse") == version
    assert said("--version").out.decode() == f"poolhouse {version}\n"
    places = [path for path in ROOT.glob("src/**/*.py") if f'"{version}"' in path.read_text(encoding="utf-8")]
    assert places == [ROOT / "src" / "poolhouse" / "version.py"]
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_a_tag_of_this_commit_is_its_version() -> None:
    # Of a folder without git's history there are no tags.
    tags = ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD", "--list", "v*"]
    found = subprocess.run(tags, capture_output=True, text=True, check=False).stdout.split()
    assert set(found) <= {f"v{poolhouse.__version__}"}


def test_the_changelog_tells_of_the_version_and_of_modules_that_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {poolhouse.__version__}\n" in text
    assert "\n## Unreleased\n" in text
    for name in re.findall(r"^\| `poolhouse[\w.]+` \| `(poolhouse[\w.]+)` \|$", text, re.MULTILINE):
        path = ROOT / "src" / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), name


def test_whatever_is_touched_has_tests_to_run() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## You touched X, run Y", 1)[1]
    rows = [line for line in section.split("\n## ", 1)[0].splitlines() if line.startswith("| ")][1:]
    touched = " ".join(row.split("|")[1] for row in rows)
    small = {"errors", "tasks", "params", "outputs", "plugins", "files", "data", "version", "testing", "bench"}
    for room in {room for line in LINES for room in line} - small:
        assert f"`{room}" in touched or f" {room}" in touched, f"{room} has no row"
    for path in re.findall(r"tests/[\w/]+(?:\.py|\.txt)?", " ".join(rows)):
        assert (ROOT / path).exists(), path


def test_the_targets_that_the_documents_name_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md", "docs/architecture.md"):
        named = set(re.findall(r"`make (\w+)", (ROOT / page).read_text(encoding="utf-8")))
        assert named <= targets, page


def test_the_slow_tests_are_there() -> None:
    for name in (ROOT / "tests" / "slow.txt").read_text().splitlines():
        path, _, function = name.partition("::")
        assert f"def {function.rpartition('::')[2]}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_hooks_and_templates_can_be_read() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff", "ruff-format", "mypy", "documents"]
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    for path in templates:
        content = yaml.safe_load(path.read_text())
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= set(content), path
            assert len({part["id"] for part in content["body"]}) == len(content["body"]), path
    assert len(templates) == 4
