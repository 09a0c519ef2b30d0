"""A Poolhouse server on a free port, for the examples whose clients speak HTTP."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def served(model: str | None) -> Iterator[str]:
    """The address of `poolhouse serve MODEL`, which ends with the block; without a model it is the embedded one."""
    options = ["--host", "127.0.0.1", "--port", "0", "--served-model-name", "the-model", "--log-level", "warning"]
    command = [sys.executable, "-m", "poolhouse.cli", "serve", *([model] if model else []), *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline().strip()
        if not line:
            sys.exit("The server did not start.")
        yield line.rsplit(" ", 1)[1]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
