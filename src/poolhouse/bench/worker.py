"""One side of a comparison, in a process of its own: commands come as JSON lines, answers go back as JSON lines.

`python -m poolhouse.bench.worker SIDE MODEL`, SIDE one of poolhouse, sentence-transformers, gemm.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

QUERY = "what is the capital of france"

Side = dict[str, Callable[..., dict[str, Any]]]


def main() -> None:
    """Answer commands until standard input ends."""
    # Libraries print to standard output now and then; the answers keep a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, model = sys.argv[1], sys.argv[2]
    side = _SIDES[name](model)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(side[command.pop("do")](**command)), file=answers, flush=True)


def _poolhouse(model: str) -> Side:
    from poolhouse import LLM

    llm = LLM(None if model == "default" else model, overflow="truncate", dtype="float32")
    llm.embed(QUERY)

    def throughput(texts: list[str], batch_size: int) -> dict[str, Any]:
        return _timed(lambda: llm.embed(texts, use_tqdm=False))

    def latency(runs: int) -> dict[str, Any]:
        return _median_of(runs, lambda: llm.embed(QUERY))

    def facts(texts: list[str]) -> dict[str, Any]:
        tokens = sum(len(output.prompt_token_ids) for output in llm.embed(texts, use_tqdm=False))
        known = llm.model.facts
        return {"tokens": tokens, "matrix_weights": known.parameters - known.vocabulary_size * known.hidden_size}

    return {"throughput": throughput, "latency": latency, "facts": facts}


def _sentence_transformers(model: str) -> Side:
    from sentence_transformers import SentenceTransformer

    if model == "default":
        from poolhouse.models.embedded import embedded_model

        model = str(embedded_model())
    encoder = SentenceTransformer(model)
    encoder.encode(QUERY)

    def throughput(texts: list[str], batch_size: int) -> dict[str, Any]:
        return _timed(lambda: encoder.encode(texts, batch_size=batch_size, show_progress_bar=False))

    def latency(runs: int) -> dict[str, Any]:
        return _median_of(runs, lambda: encoder.encode(QUERY, show_progress_bar=False))

    return {"throughput": throughput, "latency": latency}


def _gemm(_: str) -> Side:
    """The machine's float32 matrix product, by torch.mm and by a weight laid out for oneDNN beforehand."""
    import torch

    from poolhouse.layers.linear import Linear

    size = 1536
    left, right = torch.randn(size, size), torch.randn(size, size)
    linear = Linear(right)
    linear.prepack()

    @torch.inference_mode()
    def gemm() -> dict[str, Any]:
        work = 2 * size**3 / 1e9
        plain = _median_of(9, lambda: left @ right)["seconds"]
        prepacked = _median_of(9, lambda: linear(left))["seconds"]
        return {"plain": work / plain, "prepacked": work / prepacked}

    gemm()
    return {"gemm": gemm}


def _timed(call: Callable[[], object]) -> dict[str, Any]:
    started = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - started}


def _median_of(runs: int, call: Callable[[], object]) -> dict[str, Any]:
    return {"seconds": median(_timed(call)["seconds"] for _ in range(runs))}


_SIDES = {"poolhouse": _poolhouse, "sentence-transformers": _sentence_transformers, "gemm": _gemm}

if __name__ == "__main__":
    main()
