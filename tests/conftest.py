"""Options and fixtures for all tests."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

# No network at run time; libraries read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Several processes share the cores here: a thread that spins at a barrier takes the time of the one that it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

from poolhouse import kernels
from poolhouse.kernels import build as kernels_build
from tests.models.parity import Parity, Record

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("poolhouse", deadline=None)
hypothesis.settings.load_profile("poolhouse")

_TABLE = Path(__file__).parent.parent / "docs" / "models.md"
_MARKS = re.compile(r"(<!-- parity:begin -->\n).*(<!-- parity:end -->)", re.DOTALL)


# The kernels of these sources, whatever was installed; without a compiler everything is tested without kernels.
with contextlib.suppress(kernels_build.BuildError):
    kernels_build.build()

# Tests that `make quick` leaves out, so that what is left takes this many seconds on one core. Two cores then need half
# of it, and the time to import everything twice.
_SLOW = Path(__file__).parent / "slow.txt"
_QUICK_SECONDS = 300.0
_seconds: Counter[str] = Counter()
_cases: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-slow", action="store_true", help="write the tests that took long into tests/slow.txt")
    parser.addoption("--browser", help="a Chromium, which tests/browser opens; without it they are left out")
    parser.addoption("--write-pictures", action="store_true", help="write the pictures of the page into docs/pictures")
    parser.addoption("--write-models-table", action="store_true", help="write the measured parity into docs/models.md")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = set(_SLOW.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    # Ten thousand tests and what they import stay until the end: the collector of garbage need not walk them again.
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("[")[0]
    _seconds[name] += report.duration
    _cases[name] += report.when == "setup"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--write-slow"):
        slow, quick = [], _seconds.total()
        # Many quick cases of one function say more than one that takes as long.
        for name in sorted(_seconds, key=lambda name: _seconds[name] / _cases[name], reverse=True):
            if quick > _QUICK_SECONDS:
                slow.append(name)
                quick -= _seconds[name]
        _SLOW.write_text("".join(f"{name}\n" for name in sorted(slow)), encoding="utf-8")
        terminalreporter.write_line(f"{len(slow)} slow tests; the others take {quick:.0f} of {_seconds.total():.0f} s.")


@pytest.fixture
def at_level(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Has the compiled kernels use that level of instructions until the test ends; skips where this CPU has no such."""

    def set_level(level: str) -> None:
        monkeypatch.setenv(kernels.VARIABLE, level)
        kernels.forget()
        if level != "0" and kernels.level() != level:
            pytest.skip(f"no kernels of {level}")

    yield set_level
    monkeypatch.undo()
    kernels.forget()


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
    """Whole models, from text to answer, and bare backbones; two digits change with the machine, so bounds are stated."""
    whole = [row for row in rows if row.architecture]
    bare = [row for row in rows if not row.architecture]
    parts = []
    if whole:
        head = "| model | architecture | tasks | examples | served by | reference | error | packed against alone |"
        lines = [
            f"| {row.model} | {row.architecture} | {', '.join(row.tasks)} | {row.examples} | {_measured(row)} |"
            for row in sorted(whole, key=lambda row: (row.architecture, row.model))
        ]
        parts.append("\n".join([head, "|---|---|---|---|---|---|---|---|", *lines]))
    if bare:
        head = "| backbone | served by | reference | relative error | packed against alone |"
        lines = [f"| {row.model} | {_measured(row)} |" for row in sorted(bare, key=lambda row: (row.path, row.model))]
        parts.append("\n".join([head, "|---|---|---|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


def _measured(row: Parity) -> str:
    return f"{row.path} | {row.reference} | {_bound(row.error)} | {_bound(row.packing_error)}"


def _bound(error: float) -> str:
    """The power of ten above an error, so that a rerun writes the same table."""
    return next(f"< 1e-{digits}" for digits in range(7, -2, -1) if error < 10.0**-digits)
