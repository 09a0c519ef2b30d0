"""What clients send, kept in `exchanges/` as one file a client.

python -m tests.clients.record          writes them again
python -m tests.clients.record NAME     writes one; APART has clients that need an environment of their own
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.clients.recorder import Recorder

FOLDER = Path(__file__).parent / "exchanges"
# The modules with the calls of a client, and the packages that make them.
CLIENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "openai": ("test_openai", ("openai",)),
    "cohere": ("test_cohere", ("cohere",)),
    "langchain": ("test_langchain", ("langchain-openai", "langchain-cohere")),
    "llama_index": (
        "test_llama_index",
        (
            "llama-index-embeddings-openai",
            "llama-index-embeddings-text-embeddings-inference",
            "llama-index-postprocessor-cohere-rerank",
            "llama-index-postprocessor-tei-rerank",
        ),
    ),
    "litellm": ("test_litellm", ("litellm",)),
    "hugging_face": ("test_hugging_face", ("huggingface_hub",)),
    "ollama": ("test_ollama", ("ollama", "langchain-ollama")),
    "voyage": ("test_voyage", ("voyageai",)),
}
APART: dict[str, tuple[str, tuple[str, ...]]] = {
    "infinity": ("apart_infinity", ("infinity-client",)),
}


def exchanges(name: str) -> list[dict[str, Any]]:
    """What a client sends now, call by call."""
    module, _ = (CLIENTS | APART)[name]
    with Recorder() as recorder:
        return recorder.record(importlib.import_module(f"tests.clients.{module}").CALLS.items())


def recorded(name: str) -> list[dict[str, Any]]:
    """What a client sent when it was recorded."""
    kept: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["exchanges"]
    return kept


def write(name: str) -> None:
    _, packages = (CLIENTS | APART)[name]
    file = {"packages": {package: version(package) for package in packages}, "exchanges": exchanges(name)}
    (FOLDER / f"{name}.json").write_text(json.dumps(file, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    for client in sys.argv[1:] or CLIENTS:
        write(client)
