"""Who may import whom, and what deserves a file of its own: the rules of docs/architecture.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "poolhouse"

# Top down, as the drawing of docs/architecture.md has it: a room imports from lower lines only, and rooms on one line
# never import each other.
LINES = [
    ["cli"],
    ["batch"],
    ["bench", "jobs"],
    ["llm", "server", "testing"],
    ["plans"],
    ["engine"],
    ["models"],
    ["inputs", "pooling", "layers"],
    ["vectors"],
    ["kernels"],
    # Single files without a common subject: these know each other.
    ["errors", "tasks", "params", "outputs", "settings", "plugins", "files", "journal", "data", "version"],
    ["packing"],
]
WORDS = next(number for number, rooms in enumerate(LINES) if "errors" in rooms)
# The same within the two large rooms.
INSIDE = {
    "models": [
        ["load"],
        ["pipelines", "load_native", "fallback"],
        ["model"],
        ["plan"],
        ["adapters"],
        ["roles"],
        ["vision"],
        ["native"],
        ["heads"],
        ["files", "backbone"],
    ],
    "server": [
        ["process"],
        ["app"],
        ["openapi"],
        ["dialects"],
        ["routing"],
        ["call"],
        ["engines"],
        ["batches"],
        ["on_demand"],
        ["models_dir", "served"],
        ["page", "telemetry", "wire"],
        ["security"],
    ],
}


def _imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs, wherever in the file."""
    found: set[str] = set()
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                inner if (inner := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return found


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that are for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _running(node)


def _name(path: Path) -> str:
    return ".".join(("poolhouse", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
IMPORTS = {name: {other for other in _imports(path) if other != name} for name, path in MODULES.items()}
OURS = {name: {other for other in others if other in MODULES} for name, others in IMPORTS.items()}


def _line(lines: list[list[str]], room: str) -> int:
    return next((number for number, rooms in enumerate(lines) if room in rooms), -1)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"poolhouse"}))
def test_a_room_imports_from_lower_lines_only(name: str) -> None:
    for other in sorted(OURS[name] - {"poolhouse"}):
        here, there = name.split(".")[1:], other.split(".")[1:]
        lines = LINES
        if here[0] == there[0]:
            if here[0] not in INSIDE or len(here) == 1 or len(there) == 1 or here[1] == there[1]:
                continue
            lines, here, there = INSIDE[here[0]], here[1:], there[1:]
        same = lines is LINES and _line(lines, here[0]) == _line(lines, there[0]) == WORDS
        assert same or _line(lines, there[0]) > _line(lines, here[0]), f"{name} imports {other}"


def test_every_room_stands_in_the_drawing() -> None:
    rooms = {name.split(".")[1] for name in MODULES if name != "poolhouse"}
    assert rooms == {room for line in LINES for room in line}
    for outer, lines in INSIDE.items():
        inside = {name.split(".")[2] for name in MODULES if name.startswith(f"poolhouse.{outer}.")}
        assert inside == {room for line in lines for room in line}, outer


def test_no_circle_of_modules() -> None:
    # `poolhouse` itself imports others only when they are asked for.
    graph = {name: others - {"poolhouse"} for name, others in OURS.items() if name != "poolhouse"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# Entries of registries: each is found by its kind, not by the number of its readers.
REGISTRIES = (
    "poolhouse.models.native.families.",
    "poolhouse.models.heads.labelled.",
    "poolhouse.models.vision.kinds.",
    "poolhouse.models.files.quantised.",
    "poolhouse.models.vision.towers.",
    "poolhouse.server.dialects.",
    "poolhouse.layers.attention.",
    "poolhouse.kernels.",
    "poolhouse.cli.",
    "poolhouse.bench.rows.",
    # Scripts for the Python of another environment.
    "poolhouse.bench.peers",
    "poolhouse.bench.picture_peers",
)
LINES_OF_AN_IDEA = 100


def test_a_module_is_an_idea() -> None:
    """It has two importers, or is an entry of a registry, or has over 100 lines of code."""
    importers = Counter(other for others in OURS.values() for other in others)
    small = {
        name: (importers[name], lines)
        for name, path in MODULES.items()
        if path.name != "__init__.py"
        and not name.startswith(REGISTRIES)
        and importers[name] < 2
        and (lines := lines_of_code(path)) <= LINES_OF_AN_IDEA
    }
    assert not small


def lines_of_code(path: Path) -> int:
    """Lines that are no blanks, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    documents: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                documents.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(
        1
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#") and number not in documents
    )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_heavy_libraries_stay_in_their_rooms(name: str) -> None:
    libraries = {other.split(".")[0] for other in IMPORTS[name]}
    if name.startswith("poolhouse.server."):
        assert "torch" not in libraries
    if "transformers" in libraries:
        # Tokenizers of old files, and processors of pictures; everything else of transformers is the fallback's.
        assert name.startswith(("poolhouse.models.fallback.", "poolhouse.bench.")) or name in (
            "poolhouse.inputs.tokenizer_files",
            "poolhouse.inputs.media.processor",
            # A process of its own, for code of a checkpoint.
            "poolhouse.cli.own_code",
        )


def test_one_request_runs_through_few_files() -> None:
    script = SOURCE.parent.parent / "benchmarks" / "files_run.py"
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    files = {what: int(count) for what, count in re.findall(r"^(\S.*): (\d+) files$", output, re.MULTILINE)}
    assert set(files) == {"LLM.embed", "POST /v1/embeddings"}
    assert files["LLM.embed"] <= 27
    assert files["POST /v1/embeddings"] <= 41
