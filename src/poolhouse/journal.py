"""Journal: a file of JSON lines that survives the kill of its writer, which holds it alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import orjson

from poolhouse.errors import ConfigError


class JournalFile:
    """Lines that were written whole, and more of them; each is on the disk when `append` returns.

    entries: those that were there. A last line that is torn is cut off.

    Raises:
        ConfigError: another process holds the file; the message names `place`.
    """

    def __init__(self, path: Path, place: Path | None = None) -> None:
        self._stream: IO[bytes] = path.open("a+b")
        self.entries: list[dict[str, Any]] = []
        try:
            hold(self._stream, place or path)
            self._read()
        except BaseException:
            self._stream.close()
            raise

    def append(self, entry: Mapping[str, object]) -> None:
        """Write a line."""
        self._stream.seek(0, os.SEEK_END)
        self._stream.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Let others hold the file."""
        self._stream.close()

    def _read(self) -> None:
        self._stream.seek(0)
        whole = 0
        for line in self._stream:
            try:
                entry = orjson.loads(line)
            except orjson.JSONDecodeError:
                break
            if not line.endswith(b"\n"):
                break
            self.entries.append(entry)
            whole += len(line)
        self._stream.truncate(whole)


def hold(stream: IO[bytes], place: Path) -> None:
    """Keep other processes from this file until it is closed, where the system can.

    Raises:
        ConfigError: another one holds it.
    """
    try:
        fcntl = import_module("fcntl")
    except ImportError:
        return  # another system: two writers in one place are the user's care
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"Another process writes to {place}.") from None


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """What two descriptions of a work do not share, in words; empty where they are equal."""
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in differ)
