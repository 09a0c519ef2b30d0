"""The pages of the site: docs/, and those of the repository's root that belong to it, with links that hold there.

`python -m tests.docs.site FOLDER` writes them, and `mkdocs.yml` names the folder; it needs the standard library alone.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Pages of the root, by their names in the site. README.md is the front of the repository, as docs/index.md is of the site.
OF_THE_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "reporting.md"}
_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def write(folder: Path) -> None:
    """Replace the folder by the pages of today."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder)
    for path in folder.rglob("*.md"):
        depth = len(path.relative_to(folder).parts) - 1
        path.write_text(nested(_from_docs(path.read_text(encoding="utf-8"), depth)), encoding="utf-8")
    for name, page in OF_THE_ROOT.items():
        text = _LINK.sub(lambda found: f"]({_from_root(found[1])})", (ROOT / name).read_text(encoding="utf-8"))
        (folder / page).write_text(nested(text), encoding="utf-8")


def nested(text: str) -> str:
    """What belongs to an item of a list, indented by four blanks as Python's Markdown wants it; code hosts want two."""
    lines, fence = [], None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        more = indent if fence is None else fence
        if line.lstrip(" ").startswith("```"):
            fence = indent if fence is None else None
        lines.append(" " * more + line if line.strip() else line)
    return "\n".join(lines) + "\n"


def _from_docs(text: str, depth: int) -> str:
    """A page of docs/, `depth` folders below it: its links to the root lead to pages beside docs/."""
    above = "../" * depth
    for name, page in OF_THE_ROOT.items():
        text = text.replace(f"]({above}../{name}", f"]({above}{page}")
    return text


def _from_root(link: str) -> str:
    path, sharp, anchor = link.partition("#")
    return OF_THE_ROOT.get(path, path.removeprefix("docs/")) + sharp + anchor


if __name__ == "__main__":
    write(Path(sys.argv[1]))
