"""How many short texts a second a static table answers: as one matrix, as outputs, as a stream, and over HTTP.

    python benchmarks/static_table.py /tmp/table && python benchmarks/million_rows.py -- --model /tmp/table

The table is random, in the shape of potion-base-8M (29,528 tokens, 256 numbers), with the tokenizer of the demo model, and
is left in the folder. Texts are those of million_rows.py. Over HTTP four clients send 512 texts a request, and ask for
base64. Processor time is that of the process, and does not count what other work on the machine takes.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from safetensors.numpy import save_file

from poolhouse import LLM
from poolhouse.models.files.hub import embedded_model
from poolhouse.server.app import create_app

CLIENTS, INPUTS, PORT = 4, 512, 8765


def main() -> None:
    """Make the table and the texts, and print a line for each road."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the table is made")
    parser.add_argument("--texts", type=int, default=1_000_000)
    options = parser.parse_args()
    make(options.folder)
    texts = drawn(options.texts)
    with LLM(str(options.folder)) as llm:
        llm.embed_array(texts[:5000], use_tqdm=False)
        timed("embed_array", len(texts), lambda: llm.embed_array(texts, use_tqdm=False))
        part = texts[: len(texts) // 5]
        timed("embed", len(part), lambda: llm.embed(part, use_tqdm=False))
        timed("stream", len(part), lambda: sum(1 for _ in llm.stream(part)))
        server = uvicorn.Server(uvicorn.Config(create_app([llm.engine]), port=PORT, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        timed("HTTP", len(part), lambda: over_http(part))
        server.should_exit = True
        thread.join()


def make(folder: Path) -> None:
    """A random table of model2vec's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((embedded_model() / "tokenizer.json").read_text("utf-8"))
    words = [word for word in tokenizer["model"]["vocab"] if not word.startswith("[unused")]
    tokenizer["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    for token in tokenizer["added_tokens"]:
        token["id"] = words.index(token["content"])
    tokenizer |= {"post_processor": None, "truncation": None, "padding": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}), "utf-8")
    rows = np.random.default_rng(0).normal(size=(len(words), 256)).astype(np.float32)
    save_file({"embeddings": rows}, folder / "model.safetensors")


def drawn(count: int) -> list[str]:
    """Texts of 3 to 16 words."""
    known = np.array(re.findall(r"[^\W\d_]+", files("poolhouse.data").joinpath("passages.txt").read_text("utf-8")))
    random = np.random.default_rng(0)
    lengths = random.integers(3, 17, count)
    words = np.split(known[random.integers(0, len(known), lengths.sum())], np.cumsum(lengths)[:-1])
    return [" ".join(own) for own in words]


def over_http(texts: list[str]) -> None:
    bodies = [
        {"input": texts[first : first + INPUTS], "encoding_format": "base64"} for first in range(0, len(texts), INPUTS)
    ]
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=600) as client, ThreadPoolExecutor(CLIENTS) as pool:
        for reply in pool.map(lambda body: client.post("/v1/embeddings", json=body), bodies):
            reply.raise_for_status()


def timed(road: str, texts: int, work: Callable[[], object]) -> None:
    began, used = time.perf_counter(), time.process_time()
    work()
    seconds, cores = time.perf_counter() - began, time.process_time() - used
    print(
        f"{road}: {texts:,} texts in {seconds:.1f} s, {texts / seconds:,.0f} a second, {cores / texts * 1e6:.0f} us each"
    )


if __name__ == "__main__":
    main()
