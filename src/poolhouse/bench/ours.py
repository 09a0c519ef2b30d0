"""Our side of a measurement: an `LLM` in a process of its own, that runs commands.

python -m poolhouse.bench.ours '{"model": FOLDER, ...options of LLM}'
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from poolhouse.bench.sides import Commands, Result, milliseconds, seconds_of, serve_commands


def main() -> None:
    """The other end of a `SideProcess`."""
    spec = json.loads(sys.argv[1])
    sides = {"ceilings": _ceilings, "gpu-ceilings": _gpu_ceilings}
    side = sides.get(spec.pop("side", ""), _embedder)
    serve_commands(lambda: side(spec))


def _embedder(spec: dict[str, Any]) -> Commands:
    from poolhouse.llm import LLM

    before = _resident()
    llm = LLM(spec.pop("model"), overflow="truncate", **spec)
    after = _resident()

    if "embed" in llm.engine.facts.tasks:
        llm.embed_array(["warm"], use_tqdm=False)

    def throughput(texts: list[str]) -> Result:
        return {"seconds": seconds_of(lambda: llm.embed_array(texts, use_tqdm=False))}

    def latency(text: str, runs: int, seconds: float) -> Result:
        return {"ms": milliseconds(lambda: llm.embed_array(text, use_tqdm=False), runs, seconds)}

    def outside(text: str, runs: int) -> Result:
        """Milliseconds of a query that the pass through the model did not take."""
        watch = _Watch()
        llm.engine.observe(watch)
        spent = []
        for _ in range(runs):
            watch.reported.clear()
            whole = seconds_of(lambda: llm.embed_array(text, use_tqdm=False))
            # The report may come a moment after the answer.
            if watch.reported.wait(5):
                spent.append(1000 * (whole - watch.seconds))
        llm.engine.observe(None)
        return {"ms": median(spent)}

    def vectors(texts: list[str], output: str) -> Result:
        import numpy as np

        np.save(output, llm.embed_array(texts, use_tqdm=False))
        return {}

    def count(texts: list[str]) -> Result:
        """Tokens of texts, without running them."""
        from poolhouse.engine.request import Request
        from poolhouse.inputs.prompts import parse_prompts

        task = llm.engine.facts.tasks[0]
        requests = [Request(prompt, task) for prompt in parse_prompts(texts, "texts")]
        longest = llm.model.facts.max_tokens
        return {"tokens": sum(min(len(one.ids), longest) for one in llm.engine.tokenize(requests))}

    def rerank(query: str | list[str], documents: list[str]) -> Result:
        scores: list[float] = []

        def run() -> None:
            scores.extend(output.outputs.score for output in llm.score(query, documents, use_tqdm=False))

        return {"seconds": seconds_of(run), "scores": scores}

    def memory(texts: list[str], passes: int) -> Result:
        """Resident MiB before and after loading, at the peak, and after each pass over the texts."""
        flat = []
        for _ in range(passes):
            llm.embed_array(texts, use_tqdm=False)
            flat.append(_resident())
        return {"before": before, "loaded": after, "peak": _resident("VmHWM"), "passes": flat}

    def uniform(length: int, count: int) -> Result:
        """Seconds for `count` prompts of so many tokens each, and the tokens."""
        prompts = [
            {"prompt_token_ids": [1000 + (7 * text + place) % 20000 for place in range(length)]}
            for text in range(count)
        ]
        return {"seconds": seconds_of(lambda: llm.embed_array(prompts, use_tqdm=False)), "tokens": length * count}  # type: ignore[arg-type]

    commands: dict[str, Callable[..., Result]] = {
        "throughput": throughput,
        "latency": latency,
        "outside": outside,
        "vectors": vectors,
        "count": count,
        "rerank": rerank,
        "memory": memory,
        "uniform": uniform,
    }
    return commands


class _Watch:
    """Keeps how long the last batch took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.reported = threading.Event()

    def tokenized(self, texts: int, seconds: float) -> None:
        pass

    def ran(self, batch: Any) -> None:
        self.seconds = batch.forward_seconds + batch.pooling_seconds
        self.reported.set()


def _resident(name: str = "VmRSS") -> float:
    """MiB of memory of this process; 0 on systems without /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0.0
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def _ceilings(spec: dict[str, Any]) -> Commands:
    """Rates of products by type, and of reading memory, with all cores of this process."""
    import torch

    from poolhouse.engine.process import limit_threads_to_quota
    from poolhouse.layers.int8 import Int8Linear
    from poolhouse.layers.linear import Linear

    limit_threads_to_quota()
    rows, width, inner = spec["rows"], spec["width"], spec["inner"]
    work = 2 * rows * width * inner / 1e9

    def rate(call: Callable[[], object]) -> float:
        call()
        # Other programs on the machine can only lower it.
        return float(work / min(seconds_of(call) for _ in range(5)))

    @torch.inference_mode()
    def products(dtype: str) -> Result:
        x, weight = torch.randn(rows, width), torch.randn(inner, width)
        if dtype == "int8":
            packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(weight, 0.05, 0, torch.qint8), None)
            ours = Int8Linear(weight)
            return {
                "rate": max(rate(lambda: torch.ops.quantized.linear_dynamic(x, packed, True)), rate(lambda: ours(x)))
            }
        kind = getattr(torch, dtype)
        x, weight = x.to(kind), weight.to(kind)
        linear = Linear(weight)
        linear.prepack()
        return {"rate": max(rate(lambda: x @ weight.T), rate(lambda: linear(x)))}

    def reading(megabytes: float) -> Result:
        """GB/s of reading so many MB again and again: from a cache, where they fit into one."""
        numbers = torch.ones(max(1, int(megabytes * 1e6 / 4)))
        times = sorted(seconds_of(numbers.sum) for _ in range(9))
        return {"rate": megabytes / 1e3 / times[0]}

    return {"products": products, "reading": reading}


def _gpu_ceilings(spec: dict[str, Any]) -> Commands:
    """The rate of bfloat16 products of a model's own shape on CUDA."""
    import torch

    rows, width, inner = spec["rows"], spec["width"], spec["inner"]
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(inner, width, device="cuda", dtype=torch.bfloat16)

    def products(dtype: str) -> Result:
        def many() -> None:
            for _ in range(20):
                torch.mm(x, weight.T)
            torch.cuda.synchronize()

        many()
        seconds = min(seconds_of(many) for _ in range(5)) / 20
        time.sleep(0.1)
        return {"rate": 2 * rows * width * inner / 1e9 / seconds}

    return {"products": products}


if __name__ == "__main__":
    main()
