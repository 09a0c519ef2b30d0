"""Process of a server, before slow imports: signals, standard streams, errors as JSON lines."""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

_JSON_IN_A_FILE = re.compile(rb"""^log[-_]format\s*:\s*["']?json\b""", re.MULTILINE)


def begin(arguments: Sequence[str]) -> None:
    """Make the process stop on signals, own its standard streams, and write JSON where that is configured.

    Also begin to load torch, and collect no garbage meanwhile: imports make half a million objects that stay, and the
    collector would walk them many times. `poolhouse.server.process.run` ends that.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        # To the first process of a container a signal without a handler does nothing. There is nothing to tidy up yet.
        signal.signal(number, lambda *_: os._exit(0))
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Closed by whoever started us: a socket would get its number, and what is printed.
            os.open(os.devnull, os.O_RDWR)
    if wants_json(arguments, os.environ):
        speak_json()
    gc.disable()
    from poolhouse.engine.process import let_threads_wait_shortly, load_torch_ahead

    # OpenMP looks at that when torch is loaded.
    let_threads_wait_shortly()
    if _last(arguments, "--replicas") is None and _last(arguments, "--data-parallel-size") is None:
        # Replicas load it, each in its own process.
        load_torch_ahead()


def wants_json(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the log is to be JSON, as far as that is known before options are read, which may fail."""
    chosen = _last(arguments, "--log-format")
    if chosen is not None:
        return chosen == "json"
    config = _last(arguments, "--config") or environment.get("POOLHOUSE_CONFIG")
    if config:
        try:
            content = Path(config).read_bytes()
        except OSError:
            content = b""
        if b"log-format" in content or b"log_format" in content:
            return _JSON_IN_A_FILE.search(content) is not None
    return environment.get("POOLHOUSE_LOG_FORMAT") == "json"


def _last(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option, written with - or _, in one argument or in two."""
    found = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option:
            found = value if equals else following
    return found


def speak_json() -> None:
    """From here on every line of standard error is a JSON object, whoever writes it."""
    if sys.stderr is None or isinstance(sys.stderr, JsonStream):
        return
    stream = JsonStream(sys.stderr)
    sys.stderr = stream
    atexit.register(stream.finish)

    def uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        stream.emit("error", f"{kind.__name__}: {error}", error="".join(traceback.format_exception(kind, error, trace)))

    def warned(message: Warning | str, *_: object, **__: object) -> None:
        stream.emit("warning", str(message))

    sys.excepthook = uncaught
    threading.excepthook = lambda event: uncaught(event.exc_type, event.exc_value, event.exc_traceback)
    sys.unraisablehook = lambda event: uncaught(event.exc_type, event.exc_value, event.exc_traceback)
    warnings.showwarning = warned


class JsonStream:
    """Standard error whose lines become JSON objects, as those of the log are; lines that are JSON objects stay as they are.

    beneath: the stream itself, for writers of whole objects.
    """

    def __init__(self, beneath: TextIO) -> None:
        self.beneath = beneath
        self._rest = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._line(line)
            # Of a progress bar, the last state counts.
            self._rest = self._rest.rpartition("\r")[2] if not self._rest.endswith("\r") else self._rest
        return len(text)

    def emit(self, level: str, message: str, **more: str) -> None:
        """Write an object with this message."""
        now = time.time()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}+00:00"
        record = {"time": moment, "level": level, "logger": "poolhouse", "message": message, **more}
        self._put(json.dumps(record, ensure_ascii=False))

    def finish(self) -> None:
        """Write what has no line end yet."""
        with self._lock:
            rest, self._rest = self._rest, ""
            self._line(rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)

    def _line(self, line: str) -> None:
        line = line.rstrip("\r").rpartition("\r")[2].rstrip()
        if not line:
            return
        try:
            whole = line.startswith("{") and isinstance(json.loads(line), dict)
        except ValueError:
            whole = False
        if whole:
            self._put(line)
        else:
            self.emit("error", line.removeprefix("poolhouse: "))

    def _put(self, line: str) -> None:
        try:
            self.beneath.write(line + "\n")
            self.beneath.flush()
        except (OSError, ValueError):
            # Nobody reads it any more. The server need not die of that.
            pass
