"""Reranking one query and a hundred documents with a ColBERT of MiniLM's size, beside sentence-transformers.

    python benchmarks/colbert_rerank.py [--documents 100] [--rounds 5]

The model is the embedded MiniLM with a random projection to 128 and markers, saved by sentence-transformers'
MultiVectorEncoder. Each side has a process of its own, and rounds alternate. A side reads the query and all documents
and scores them; the other at its best batch size. Prints medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poolhouse.data import ragged_texts

QUERY = "why does the sea rise and fall twice a day?"
BATCH_SIZES = (8, 16, 32, 64)

Side = Callable[[Sequence[str], int], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        work(SIDES[asked.side](asked.model))
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        workers = {name: Worker(name, folder) for name in SIDES}
        compare(workers, ragged_texts(asked.documents), asked.rounds)
        for worker in workers.values():
            worker.close()


def compare(workers: dict[str, Worker], documents: Sequence[str], rounds: int) -> None:
    expected: list[float] = []
    sizes: dict[str, int] = {}
    for name, worker in workers.items():
        timed = {size: worker.seconds(documents, size) for size in (BATCH_SIZES if name != "poolhouse" else (0,))}
        sizes[name] = min(timed, key=lambda size: timed[size])
        expected = expected or worker.scores
        difference = np.abs(np.array(worker.scores) - expected).max()
        print(f"{name}: batch size {sizes[name] or 'its own'}, largest difference of a score {difference:.1e}")
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.seconds(documents, sizes[name]))
    ours = times["poolhouse"]
    for name, own in times.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(own, ours, strict=True))
        print(f"{name:24} {statistics.median(own):7.3f} s for {len(documents)} documents, {ratio:5.2f} x ours")


def build(folder: Path) -> None:
    """The model that all sides load."""
    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    from poolhouse.models.files.hub import embedded_model

    torch.manual_seed(0)
    backbone = Transformer(
        str(embedded_model()), query_expansion={"strategy": "fixed", "length": 32}, document_length=256
    )
    tokens = "token_embeddings"
    modules: list[Any] = [
        backbone,
        Dense(384, 128, bias=False, activation_function=torch.nn.Identity(), module_input_name=tokens),
        MultiVectorMask(skiplist_words=list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"), skiplist_tasks=["document"]),
        Normalize(module_input_name=tokens),
    ]
    prompts = {"query": "[unused0] ", "document": "[unused1] "}
    MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(folder))


def poolhouse(model: str) -> Side:
    from poolhouse import LLM

    llm = LLM(model, overflow="truncate", dtype="float32")
    return lambda documents, _: [score.outputs.score for score in llm.score(QUERY, list(documents), use_tqdm=False)]


def sentence_transformers(model: str) -> Side:
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.util import maxsim

    encoder = MultiVectorEncoder(model, device="cpu")

    def scores(documents: Sequence[str], batch_size: int) -> list[float]:
        query = encoder.encode_query([QUERY], show_progress_bar=False)
        vectors = encoder.encode_document(list(documents), batch_size=batch_size, show_progress_bar=False)
        return [float(score) for score in maxsim(query, vectors)[0]]

    return scores


SIDES: dict[str, Callable[[str], Side]] = {
    "poolhouse": poolhouse,
    "sentence-transformers": sentence_transformers,
}


class Worker:
    """A side in its own process."""

    def __init__(self, side: str, model: str) -> None:
        command = [sys.executable, __file__, "--side", side, "--model", model]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.scores: list[float] = []

    def seconds(self, documents: Sequence[str], batch_size: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([list(documents), batch_size]), file=self.process.stdin, flush=True)
        while not (line := self.process.stdout.readline()).startswith('{"seconds"'):
            if not line:
                raise SystemExit("A side ended; see above.")
        answer = json.loads(line)
        self.scores = answer["scores"]
        return float(answer["seconds"])

    def close(self) -> None:
        self.process.communicate()


def work(side: Side) -> None:
    """Answer until standard input ends."""
    for line in sys.stdin:
        documents, batch_size = json.loads(line)
        start = time.perf_counter()
        scores = side(documents, batch_size)
        print(json.dumps({"seconds": time.perf_counter() - start, "scores": scores}), flush=True)


if __name__ == "__main__":
    main()
