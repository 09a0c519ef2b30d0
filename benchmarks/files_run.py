"""How many files of Poolhouse one request runs through: by `LLM.embed`, and by POST /v1/embeddings over a real socket.

A profile function sees every call in every thread; a file counts when one of its functions is entered between the
request and its reply, after the same request was answered before. Of three requests the one with the fewest files counts:
what is done once a second is no part of a request. Compiled kernels, of which each kind of processor has others, are left
out: they answer from fewer files.

    python benchmarks/files_run.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType

os.environ["POOLHOUSE_KERNELS"] = "0"
SOURCE = str(Path(__file__).parent.parent / "src" / "poolhouse") + "/"
BODY = json.dumps({"input": "How warm is the water of the pool?"}).encode()


class Files:
    """The files whose functions are entered while a request is answered."""

    def __init__(self) -> None:
        self.watching = False
        self.seen: set[str] = set()

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        if self.watching and event == "call":
            name = frame.f_code.co_filename
            if name.startswith(SOURCE):
                self.seen.add(name.removeprefix(SOURCE))

    def install(self) -> None:
        """Before any thread that is to be seen is started."""
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)

    def of(self, request: Callable[[], object]) -> list[str]:
        """The files of the request that runs through the fewest, of three."""
        runs = []
        for _ in range(3):
            self.seen = set()
            self.watching = True
            request()
            self.watching = False
            runs.append(sorted(self.seen))
        return min(runs, key=len)


def main() -> None:
    files = Files()
    files.install()
    from poolhouse import LLM
    from poolhouse.server.app import create_app

    with LLM() as llm:
        llm.embed("warm")
        _print("LLM.embed", files.of(lambda: llm.embed("How warm is the water of the pool?")))
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/embeddings"
            server = threading.Thread(target=_serve, args=(create_app([llm.engine]), listening), daemon=True)
            server.start()
            _post(url)
            _print("POST /v1/embeddings", files.of(lambda: _post(url)))


def _serve(app: object, listening: socket.socket) -> None:
    import uvicorn

    from poolhouse.server.process.connections import bounded_protocol
    from poolhouse.settings import ServerSettings

    config = uvicorn.Config(app, log_level="error", http=bounded_protocol(ServerSettings()))
    asyncio.run(uvicorn.Server(config).serve([listening]))


def _post(url: str) -> None:
    request = urllib.request.Request(url, BODY, {"Content-Type": "application/json"})
    for _ in range(100):
        # Refused until the server listens.
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(request) as reply:
            reply.read()
            return
        time.sleep(0.1)


def _print(what: str, files: list[str]) -> None:
    print(f"{what}: {len(files)} files")
    for name in files:
        print(f"  {name}")


if __name__ == "__main__":
    main()
