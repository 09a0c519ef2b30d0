"""Options and fixtures for all tests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

# No network at run time; libraries read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from tests.models.parity import Parity, Record

_TABLE = Path(__file__).parent.parent / "docs" / "models.md"
_MARKS = re.compile(r"(<!-- parity:begin -->\n).*(<!-- parity:end -->)", re.DOTALL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-models-table", action="store_true", help="write the measured parity into docs/models.md")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def _parities(request: pytest.FixtureRequest) -> Iterator[list[Parity]]:
    rows: list[Parity] = []
    yield rows
    if request.config.getoption("--write-models-table"):
        _TABLE.write_text(_MARKS.sub(lambda found: found[1] + _table(rows) + found[2], _TABLE.read_text()))


@pytest.fixture
def record_parity(_parities: list[Parity]) -> Record:
    """Puts a measured row into the table of docs/models.md."""
    return _parities.append


def _table(rows: list[Parity]) -> str:
    head = (
        "| model | tasks | served by | reference | error | packed against alone | examples |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    # Two digits change with the machine: the table states the order of magnitude.
    return head + "".join(
        f"| {row.model} | {row.tasks} | {row.path} | {row.reference} | {_bound(row.error)} "
        f"| {_bound(row.packing_error)} | {row.examples} |\n"
        for row in sorted(rows, key=lambda row: (row.path, row.model))
    )


def _bound(error: float) -> str:
    """The power of ten above an error, so that a rerun writes the same table."""
    return next(f"< 1e-{digits}" for digits in range(7, -2, -1) if error < 10.0**-digits)
