"""Texts of a command: a line each, from a file or from standard input."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from poolhouse.errors import ConfigError

# Texts that are in memory at once.
_AT_ONCE = 4096


def lines(source: str, stack: contextlib.ExitStack) -> Iterator[str]:
    """The lines of a file, or of standard input ("-"), but for blank ones; the stack closes it.

    Raises:
        ConfigError: naming the line that is not UTF-8.
    """
    stream: IO[bytes] = sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))  # noqa: SIM115 - the stack closes it
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"Line {number} of {_words(source)} is not UTF-8: {error}") from None
        if text.strip():
            yield text


def groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists that fit into memory."""
    rest = iter(texts)
    while group := list(itertools.islice(rest, _AT_ONCE)):
        yield group


def nothing_in(source: str) -> ConfigError:
    """The error for a source without any text."""
    return ConfigError(f"There is no text in {_words(source)}.")


def _words(source: str) -> str:
    return "standard input" if source == "-" else source
