"""How many files of ours one embedding runs through, by `LLM.embed` and by POST /v1/embeddings.

A profiler notes the file of every call, in all threads. The first request is not counted: it warms up.

    python benchmarks/files_of_a_request.py
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import poolhouse

SOURCE = Path(poolhouse.__file__).parent
TEXT = "The moon pulls the sea."
_seen: set[str] = set()


def main() -> None:
    # Before any thread is started: each takes over the profiler that holds then.
    threading.setprofile(_note)
    sys.setprofile(_note)
    from fastapi.testclient import TestClient

    from poolhouse import LLM
    from poolhouse.server.app import create_app

    with LLM() as llm:
        _report("LLM.embed", lambda: llm.embed(TEXT))
        with TestClient(create_app([llm.engine])) as http:
            _report("POST /v1/embeddings", lambda: http.post("/v1/embeddings", json={"input": TEXT}).raise_for_status())


def _note(frame: FrameType, event: str, _: object) -> None:
    # While the interpreter ends, names of modules are None.
    if event == "call" and _seen is not None:
        _seen.add(frame.f_code.co_filename)


def _report(name: str, request: Callable[[], object]) -> None:
    request()
    _seen.clear()
    request()
    # The threads of the engine go on noting.
    seen = [Path(file) for file in _seen.copy()]
    files = sorted(str(path.relative_to(SOURCE)) for path in seen if path.is_relative_to(SOURCE))
    print(f"{name}: {len(files)} files")
    for file in files:
        print(f"  {file}")


if __name__ == "__main__":
    main()
