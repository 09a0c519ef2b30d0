"""How many files of Poolhouse one request runs through: by `LLM.embed`, and by POST /v1/embeddings over a real socket.

A profile function sees every call in every thread; a file counts when one of its functions is entered between the
request and its reply, after the same request was answered before.

    python benchmarks/files_run.py
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import FrameType

SOURCE = str(Path(__file__).parent.parent / "src" / "poolhouse") + "/"
BODY = json.dumps({"input": "How warm is the water of the pool?"}).encode()


class Files:
    """The files whose functions are entered while `on` is set."""

    def __init__(self) -> None:
        self.on = False
        self.seen: set[str] = set()

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        if self.on and event == "call":
            name = frame.f_code.co_filename
            if name.startswith(SOURCE):
                self.seen.add(name.removeprefix(SOURCE))

    def install(self) -> None:
        """Before any thread that is to be seen is started."""
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)


def main() -> None:
    files = Files()
    files.install()
    from poolhouse import LLM
    from poolhouse.server.app import create_app

    with LLM() as llm:
        llm.embed("warm")
        files.on = True
        llm.embed("How warm is the water of the pool?")
        files.on = False
        _print("LLM.embed", files)

        files.seen = set()
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/embeddings"
            server = threading.Thread(target=_serve, args=(create_app([llm.engine]), listening), daemon=True)
            server.start()
            for _ in range(50):
                try:
                    _post(url)
                    break
                except OSError:
                    time.sleep(0.1)
            files.on = True
            _post(url)
            files.on = False
            _print("POST /v1/embeddings", files)


def _serve(app: object, listening: socket.socket) -> None:
    import uvicorn

    from poolhouse.server.process.connections import bounded_protocol
    from poolhouse.settings import ServerSettings

    config = uvicorn.Config(app, log_level="error", http=bounded_protocol(ServerSettings()))
    asyncio.run(uvicorn.Server(config).serve([listening]))


def _post(url: str) -> None:
    request = urllib.request.Request(url, BODY, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        reply.read()


def _print(what: str, files: Files) -> None:
    print(f"{what}: {len(files.seen)} files")
    for name in sorted(files.seen):
        print(f"  {name}")


if __name__ == "__main__":
    main()
