"""Who may import whom: a room imports from lower lines only, and rooms on one line never import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "poolhouse"

# The map of docs/architecture.md, top down.
LINES = [
    ["cli"],
    ["bench"],
    ["llm", "server", "testing"],
    ["scoring", "late_chunking"],
    ["combined"],
    ["sparse"],
    ["engine"],
    ["models", "inputs"],
    ["pooling", "layers"],
    [
        *("tasks", "params", "lora", "outputs", "errors", "tokens", "segments", "batch", "settings", "data"),
        *("spans", "plugins", "json_files", "chat_files", "precision", "vllm_options", "sides"),
        *("max_sim", "token_pooling", "token_embeddings", "token_files", "whole_files"),
    ],
]
# Rooms of the last line know each other: they are single files without a common subject.
LOWEST = len(LINES) - 1


def line_of(room: str) -> int:
    return next(number for number, rooms in enumerate(LINES) if room in rooms)


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("poolhouse.") and name.split(".")[1].islower()}


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_from_lower_lines_only(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for other in rooms(imports(path)) - {room}:
        allowed = line_of(other) > line_of(room) or line_of(room) == LOWEST
        assert allowed, f"{path.relative_to(SOURCE)} imports {other}"


def test_every_room_stands_in_the_map() -> None:
    present = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES}
    assert present <= {room for line in LINES for room in line}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    place = path.relative_to(SOURCE)
    libraries = {name.split(".")[0] for name in imports(path)}
    if place.parts[0] == "server":
        assert "torch" not in libraries
    if "transformers" in libraries:
        # The tokenizer converts old files; everything else of transformers is the fallback's.
        assert place.parts[0] == "models" or str(place) == "inputs/tokenizer_files.py", place
        assert place.parts[0] != "models" or place.name.startswith(("hugging_face", "pack")), place
