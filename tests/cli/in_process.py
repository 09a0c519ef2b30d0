"""The command line, run within the test: imports and fixtures are there already."""

from __future__ import annotations

import gc
import io
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from poolhouse.cli import main


@dataclass(frozen=True)
class Said:
    status: int
    out: bytes
    error: str


Run = Callable[..., Said]
RunText = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Runs `poolhouse ARGUMENTS`, with these bytes on standard input, and tells what it did."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> Said:
        monkeypatch.setattr(sys, "argv", ["poolhouse", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setenv("COLUMNS", "200")
        before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)]
        formatwarning = warnings.formatwarning
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                # pytest collects warnings; users see them.
                monkeypatch.setattr(warnings, "_showwarnmsg_impl", _show)
                main()
            status: object = 0
        except SystemExit as stopped:
            status = stopped.code or 0
        finally:
            warnings.formatwarning = formatwarning
            for number, handler in before:
                signal.signal(number, handler)
            # A server's process leaves garbage until it has started; this one goes on.
            gc.enable()
        sys.stdout.flush()
        out, error = capfdbinary.readouterr()
        assert isinstance(status, int)
        assert b"Traceback" not in error
        return Said(status, out, error.decode())

    return run


@pytest.fixture
def run(said: Run) -> RunText:
    """As `said`, with texts in and out."""

    def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        done = said(*arguments, stdin=text.encode())
        return subprocess.CompletedProcess(arguments, done.status, done.out.decode(), done.error)

    return run


def _show(message: warnings.WarningMessage) -> None:
    sys.stderr.write(warnings.formatwarning(message.message, message.category, message.filename, message.lineno))
